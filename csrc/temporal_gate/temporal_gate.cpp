#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "temporal_gate/temporal_gate_cpu.inc"

namespace vtok {

void check_temporal_gate(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame, int64_t sites,
                         double threshold, const std::string& reference, const std::string& metric, double eps,
                         int64_t refresh, const std::optional<Tensor>& state_rows,
                         const std::optional<Tensor>& state_weight, const std::optional<Tensor>& state_step) {
  const char* op = "temporal_gate";
  expect_dim(op, "tokens", tokens, 2, "(S, D)");
  expect_float(op, "tokens", tokens);
  expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, tokens);
  expect_index(op, "tokens_per_frame", tokens_per_frame, tokens, "(V,)");
  const int64_t videos = cu_seqlens.size(0) - 1, D = tokens.size(1);
  VTOK_EXPECT(tokens_per_frame.size(0) == videos, op, text("tokens_per_frame of shape (V,)=(", videos, ",)"),
              shape_text(tokens_per_frame));
  VTOK_EXPECT(sites >= 0, op, "sites >= 0", sites);
  VTOK_EXPECT(!std::isnan(threshold), op, "threshold to be a number", "nan");
  VTOK_EXPECT(reference == "previous" || reference == "last_kept" || reference == "run_mean", op,
              "reference of \"previous\", \"last_kept\" or \"run_mean\"", text('"', reference, '"'));
  VTOK_EXPECT(metric == "cosine" || metric == "l2", op, "metric of \"cosine\" or \"l2\"", text('"', metric, '"'));
  VTOK_EXPECT(std::isfinite(eps) && eps >= 0, op, "eps finite and >= 0", eps);
  VTOK_EXPECT(refresh >= 0, op, "refresh >= 0", refresh);
  const int given = state_rows.has_value() + state_weight.has_value() + state_step.has_value();
  VTOK_EXPECT(given % 3 == 0, op, "state_rows, state_weight and state_step, or none", text(given, " of them"));
  if (given == 0) return;
  expect_dim(op, "state_rows", *state_rows, 2, "(sites, D)");
  VTOK_EXPECT(state_rows->size(0) == sites && state_rows->size(1) == D, op,
              text("state_rows of shape (sites, D)=(", sites, ", ", D, ")"), shape_text(*state_rows));
  expect_dtype(op, "state_rows", *state_rows,
               tokens.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  expect_same_device(op, "state_rows", *state_rows, tokens);
  expect_dim(op, "state_weight", *state_weight, 1, "(sites,)");
  VTOK_EXPECT(state_weight->size(0) == sites, op, text("state_weight of shape (sites,)=(", sites, ",)"),
              shape_text(*state_weight));
  expect_dtype(op, "state_weight", *state_weight, ScalarType::Float);
  expect_same_device(op, "state_weight", *state_weight, tokens);
  expect_index(op, "state_step", *state_step, tokens, "(V,)");
  VTOK_EXPECT(state_step->size(0) == videos, op, text("state_step of shape (V,)=(", videos, ",)"),
              shape_text(*state_step));
}

namespace {

constexpr int64_t kBlockBytes = 384 * 1024;  // references of a block: they stay in the second-level cache
constexpr int64_t kAheadBytes = 16 * 1024;   // what is on its way from memory while a row is at work

void gate_block(ScalarType type, const TemporalGateVideo& video, int64_t site, int64_t width) {
  switch (type) {
    case ScalarType::Float: return temporal_gate_cpu().f32(video, site, width);
    case ScalarType::Half: return temporal_gate_cpu().f16(video, site, width);
    case ScalarType::BFloat16: return temporal_gate_cpu().bf16(video, site, width);
    default: return temporal_gate_cpu().f64(video, site, width);
  }
}

// Sites [site, end) in blocks of equal widths, `most` sites at most.
void gate_range(ScalarType type, const TemporalGateVideo& video, int64_t site, int64_t end, int64_t most) {
  for (int64_t blocks = (end - site + most - 1) / most; blocks > 0; --blocks) {
    const int64_t width = (end - site + blocks - 1) / blocks;
    gate_block(type, video, site, width);
    site += width;
  }
}

// Work is counted in rows read and state rows written, so that threads get equal shares of however uneven videos. The
// first site that starts at or after a place of its video's work.
int64_t site_at(const TemporalGateVideo& video, int64_t place) {
  const int64_t each = video.rows / video.frame + 1, longer = video.rows % video.frame;  // those have one row more
  if (place <= longer * (each + 1)) return std::max<int64_t>(0, (place + each) / (each + 1));
  return std::min(video.frame, longer + (place - longer * (each + 1) + each - 1) / each);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs temporal_gate(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame, int64_t sites,
                      double threshold, const StringArg& reference, const StringArg& metric, double eps,
                      int64_t refresh, const std::optional<Tensor>& state_rows,
                      const std::optional<Tensor>& state_weight, const std::optional<Tensor>& state_step) {
  check_temporal_gate(tokens, cu_seqlens, tokens_per_frame, sites, threshold, reference, metric, eps, refresh,
                      state_rows, state_weight, state_step);
  const int64_t rows = tokens.size(0), D = tokens.size(1), videos = cu_seqlens.size(0) - 1;
  expect_ascending("temporal_gate", "cu_seqlens", cu_seqlens, rows, "S");
  const Tensor source = dense_rows(tokens), bounds = torch::stable::contiguous(cu_seqlens);
  const Tensor frames = torch::stable::contiguous(tokens_per_frame);
  const Tensor old_rows = state_rows ? torch::stable::contiguous(*state_rows) : tokens;
  const Tensor old_weight = state_weight ? torch::stable::contiguous(*state_weight) : tokens;
  const Tensor old_step = state_step ? torch::stable::contiguous(*state_step) : cu_seqlens;
  const int64_t *cu = indices(bounds), *per_frame = indices(frames);
  int64_t total = 0;
  for (int64_t v = 0; v < videos; ++v) total += std::max<int64_t>(0, per_frame[v]);
  VTOK_EXPECT(sites == total, "temporal_gate", text("sites equal to the sum of tokens_per_frame=", total), sites);

  const ScalarType type = tokens.scalar_type(), wide = type == ScalarType::Double ? type : ScalarType::Float;
  Tensor keep = empty(tokens, {rows}, ScalarType::Bool), similarity = empty(tokens, {rows}, wide);
  Tensor next_rows = empty(tokens, {sites, D}, wide), next_weight = empty(tokens, {sites}, ScalarType::Float);
  Tensor next_step = empty(cu_seqlens, {videos}, ScalarType::Long);
  const int64_t bytes = static_cast<int64_t>(tokens.element_size());
  const int64_t wide_bytes = static_cast<int64_t>(similarity.element_size());
  const bool mean = reference == "run_mean";
  auto* kept = static_cast<uint8_t*>(keep.mutable_data_ptr());
  auto* scores = static_cast<char*>(similarity.mutable_data_ptr());

  const auto without_sites = [&](int64_t begin, int64_t end, bool inside) {
    std::fill(kept + begin, kept + end, inside);
    for (int64_t s = begin; s < end; ++s)
      if (wide == ScalarType::Double) reinterpret_cast<double*>(scores)[s] = -INFINITY;
      else reinterpret_cast<float*>(scores)[s] = -INFINITY;
  };
  std::vector<TemporalGateVideo> walked;
  std::vector<int64_t> starts{0};  // in the work of all
  for (int64_t v = 0, site = 0; v < videos; ++v) {
    const int64_t first = cu[v], count = cu[v + 1] - first, frame = std::max<int64_t>(0, per_frame[v]);
    const int64_t step = state_step ? std::max<int64_t>(0, indices(old_step)[v]) : 0;
    mutable_indices(next_step)[v] = step + (frame > 0 && count > 0 ? (count - 1) / frame + 1 : 0);
    if (frame == 0) {
      without_sites(first, first + count, true);
      continue;
    }
    walked.push_back({static_cast<const char*>(source.const_data_ptr()) + first * source.stride(0) * bytes,
                      source.stride(0), D, count, frame, kAheadBytes / (D * bytes + 1) + 1, step, refresh, eps,
                      threshold, metric == "l2", reference == "previous", mean,
                      step ? static_cast<const char*>(old_rows.const_data_ptr()) + site * D * wide_bytes : nullptr,
                      step ? static_cast<const float*>(old_weight.const_data_ptr()) + site : nullptr, kept + first,
                      scores + first * wide_bytes,
                      static_cast<char*>(next_rows.mutable_data_ptr()) + site * D * wide_bytes,
                      static_cast<float*>(next_weight.mutable_data_ptr()) + site});
    starts.push_back(starts.back() + count + frame);
    site += frame;
  }
  without_sites(cu[videos], rows, false);

  const int64_t reference_bytes = D * (mean ? wide_bytes : bytes);
  const int64_t most = std::clamp<int64_t>(kBlockBytes / (reference_bytes + 1), 1, kTemporalGateSites);
  torch::stable::parallel_for(0, starts.back(), grain(D * bytes), [&](int64_t begin, int64_t end) {
    for (auto v = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1; starts[v] < end; ++v) {
      if (v == static_cast<int64_t>(walked.size())) break;
      gate_range(type, walked[v], site_at(walked[v], begin - starts[v]), site_at(walked[v], end - starts[v]), most);
    }
  });
  return {keep, similarity, next_rows, next_weight, next_step};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_temporal_gate); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("temporal_gate", TORCH_BOX(&temporal_gate)); }

}  // namespace vtok
