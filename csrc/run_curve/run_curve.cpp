#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "run_curve/run_curve_cpu.inc"

namespace vtok {

void check_run_curve(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame, int64_t frames,
                     const std::optional<Tensor>& weights, int64_t extra_rows) {
  const char* op = "run_curve";
  expect_dim(op, "tokens", tokens, 2, "(S, D)");
  expect_float(op, "tokens", tokens);
  expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, tokens);
  expect_index(op, "tokens_per_frame", tokens_per_frame, tokens, "(V,)");
  const int64_t videos = cu_seqlens.size(0) - 1, rows = tokens.size(0);
  VTOK_EXPECT(tokens_per_frame.size(0) == videos, op, text("tokens_per_frame of shape (V,)=(", videos, ",)"),
              shape_text(tokens_per_frame));
  VTOK_EXPECT(frames >= 1, op, "frames >= 1", frames);
  VTOK_EXPECT(extra_rows >= 0, op, "extra_rows >= 0", extra_rows);
  if (!weights) return;
  expect_dim(op, "weights", *weights, 1, "(S,)");
  VTOK_EXPECT(weights->size(0) == rows, op, text("weights of shape (S,)=(", rows, ",)"), shape_text(*weights));
  expect_dtype(op, "weights", *weights, ScalarType::Float);
  expect_same_device(op, "weights", *weights, tokens);
}

namespace {

auto site_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return run_curve_cpu().f32;
    case ScalarType::Half: return run_curve_cpu().f16;
    case ScalarType::BFloat16: return run_curve_cpu().bf16;
    default: return run_curve_cpu().f64;
  }
}

std::tuple<Tensor, Tensor, Tensor> run_curve(const Tensor& tokens, const Tensor& cu_seqlens,
                                             const Tensor& tokens_per_frame, int64_t frames,
                                             const std::optional<Tensor>& weights, int64_t extra_rows) {
  check_run_curve(tokens, cu_seqlens, tokens_per_frame, frames, weights, extra_rows);
  const int64_t rows = tokens.size(0), D = tokens.size(1), words = curve_words(frames);
  expect_ascending("run_curve", "cu_seqlens", cu_seqlens, rows, "S");
  const Tensor source = dense_rows(tokens), bounds = torch::stable::contiguous(cu_seqlens);
  const Tensor per_frame = torch::stable::contiguous(tokens_per_frame);
  const Tensor weighing = weights ? torch::stable::contiguous(*weights) : tokens;
  std::vector<CurveVideo> videos;
  std::vector<int64_t> starts{0};  // the number of each video's first site
  int64_t longest = 0;
  for (int64_t v = 0; v + 1 < bounds.size(0); ++v) {
    const int64_t* const cu = indices(bounds) + v;
    videos.push_back(curve_video(cu[0], cu[1], indices(per_frame)[v], extra_rows, rows));
    starts.push_back(starts.back() + videos.back().sites);
    longest = std::max(longest, videos.back().frames);
  }
  VTOK_EXPECT(frames >= longest, "run_curve", text("frames of at least the longest video's ", longest), frames);

  Tensor curve = empty(tokens, {rows}, ScalarType::Float), gain = empty(tokens, {rows}, ScalarType::Float);
  Tensor opens = empty(cu_seqlens, {rows * words}, ScalarType::Long);
  auto* const curve_at = static_cast<float*>(curve.mutable_data_ptr());
  auto* const gain_at = static_cast<float*>(gain.mutable_data_ptr());
  int64_t* const opens_at = mutable_indices(opens);
  std::fill(curve_at, curve_at + rows, 0.0f);  // as if every row were a site of its own
  std::fill(gain_at, gain_at + rows, std::numeric_limits<float>::infinity());
  for (int64_t s = 0; s < rows * words; ++s) opens_at[s] = s % words == 0;

  const int64_t bytes = static_cast<int64_t>(tokens.element_size());
  const int64_t sites = starts.back(), workers = std::min<int64_t>(torch::stable::get_num_threads(), sites);
  const int64_t room_bytes = (curve_room(longest, words) + 63) / 64 * 64;
  Tensor room = empty(tokens, {workers * room_bytes + 64}, ScalarType::Byte);
  char* const rooms = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(room.mutable_data_ptr()) + 63) / 64 * 64);
  std::atomic<int64_t> next{0};
  const auto run = site_of(tokens.scalar_type());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t number = next++; number < sites; number = next++) {
        const auto v = std::upper_bound(starts.begin(), starts.end(), number) - starts.begin() - 1;
        const CurveVideo& video = videos[v];
        const int64_t first = video.begin + number - starts[v];
        const int64_t entry = video.begin + (number - starts[v]) * video.frames;
        run({static_cast<const char*>(source.const_data_ptr()) + first * source.stride(0) * bytes,
             video.sites * source.stride(0), D, video.frames,
             weights ? static_cast<const float*>(weighing.const_data_ptr()) + first : nullptr, video.sites, words,
             curve_at + entry, gain_at + entry, opens_at + entry * words},
            rooms + worker * room_bytes);
      }
  });
  return {curve, gain, opens};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_run_curve); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("run_curve", TORCH_BOX(&run_curve)); }

}  // namespace vtok
