#include <algorithm>
#include <cmath>

#include "common/stable.h"
#include "temporal_similarity/temporal_similarity_cpu.inc"

namespace vtok {

void check_temporal_similarity(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame,
                               const std::string& metric, double eps) {
  const char* op = "temporal_similarity";
  expect_dim(op, "tokens", tokens, 2, "(S, D)");
  expect_float(op, "tokens", tokens);
  expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, tokens);
  expect_index(op, "tokens_per_frame", tokens_per_frame, tokens, "(V,)");
  const int64_t videos = cu_seqlens.size(0) - 1;
  VTOK_EXPECT(tokens_per_frame.size(0) == videos, op, text("tokens_per_frame of shape (V,)=(", videos, ",)"),
              shape_text(tokens_per_frame));
  VTOK_EXPECT(metric == "cosine" || metric == "l2", op, "metric of \"cosine\" or \"l2\"", text('"', metric, '"'));
  VTOK_EXPECT(std::isfinite(eps) && eps >= 0, op, "eps finite and >= 0", eps);
}

namespace {

constexpr int64_t kBlockBytes = 384 * 1024;  // rows of a block: they stay in the second-level cache for one frame
constexpr int64_t kAheadBytes = 16 * 1024;   // what is on its way from memory while a row is at work

// Sites of a block: as many as the cache holds, but at least one block a thread, of equal widths.
int64_t block_width(int64_t frame, int64_t row_bytes, int64_t threads) {
  const int64_t cached = std::clamp<int64_t>(kBlockBytes / (row_bytes + 1), 1, kSimilaritySites);
  const int64_t shared = std::max<int64_t>(8, frame / threads);
  const int64_t blocks = (frame - 1) / std::min(cached, shared) + 1;
  return (frame - 1) / blocks + 1;
}

void score_places(ScalarType type, const SimilarityVideo& video, int64_t begin, int64_t end) {
  switch (type) {
    case ScalarType::Float: return temporal_similarity_cpu().f32(video, begin, end);
    case ScalarType::Half: return temporal_similarity_cpu().f16(video, begin, end);
    case ScalarType::BFloat16: return temporal_similarity_cpu().bf16(video, begin, end);
    default: return temporal_similarity_cpu().f64(video, begin, end);
  }
}

Tensor temporal_similarity(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame,
                           const StringArg& metric, double eps) {
  check_temporal_similarity(tokens, cu_seqlens, tokens_per_frame, metric, eps);
  const int64_t rows = tokens.size(0), D = tokens.size(1), videos = cu_seqlens.size(0) - 1;
  expect_ascending("temporal_similarity", "cu_seqlens", cu_seqlens, rows, "S");
  const ScalarType type = tokens.scalar_type();
  const Tensor source = dense_rows(tokens), bounds = torch::stable::contiguous(cu_seqlens);
  const Tensor frames = torch::stable::contiguous(tokens_per_frame);
  Tensor scores = empty(tokens, {rows}, type == ScalarType::Double ? type : ScalarType::Float);
  const int64_t row_bytes = D * static_cast<int64_t>(tokens.element_size());
  const int64_t stride_bytes = source.stride(0) * static_cast<int64_t>(tokens.element_size());
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(scores.mutable_data_ptr());
  const int64_t *cu = indices(bounds), *per_frame = indices(frames);
  const bool l2 = metric == "l2";
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, rows, grain(row_bytes), [&](int64_t begin, int64_t end) {
    // Video `videos` is what lies beyond the last one: a single frame, as is a video that compares nothing.
    for (int64_t v = std::upper_bound(cu, cu + videos + 1, begin) - cu - 1; v <= videos && cu[v] < end; ++v) {
      const int64_t first = cu[v], count = (v < videos ? cu[v + 1] : rows) - first;
      if (count == 0) continue;
      const int64_t n = v < videos ? per_frame[v] : 0, frame = n > 0 ? std::min(n, count) : count;
      const SimilarityVideo video{from + first * stride_bytes,
                                  source.stride(0),
                                  D,
                                  count,
                                  frame,
                                  block_width(frame, row_bytes, threads),
                                  kAheadBytes / (row_bytes + 1) + 1,
                                  eps,
                                  l2,
                                  to + first * static_cast<int64_t>(scores.element_size())};
      score_places(type, video, std::max<int64_t>(begin - first, 0), std::min(end - first, count));
    }
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_temporal_similarity); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("temporal_similarity", TORCH_BOX(&temporal_similarity)); }

}  // namespace vtok
