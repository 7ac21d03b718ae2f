// The arguments that patch_motion and motion_gate share; vtok/ops/_patch.py spells the same sentences.
#pragma once

#include <vector>

#include "common/patch.h"
#include "common/stable.h"

namespace vtok {

inline void expect_frames(const char* op, const char* name, const Tensor& frames, const char* shape) {
  expect_dim(op, name, frames, 5, shape);
  const ScalarType type = frames.scalar_type();
  VTOK_EXPECT(type == ScalarType::Byte || is_float(type), op,
              text(name, " of dtype uint8, float32, float16, bfloat16 or float64"), dtype_name(type));
}

inline PatchMetric metric_of(const char* op, const std::string& metric) {
  static constexpr const char* kNames[] = {"l1", "mse", "l2", "ssim"};
  for (int m = 0; m < 4; ++m)
    if (metric == kNames[m]) return static_cast<PatchMetric>(m);
  fail(op, "metric of \"l1\", \"mse\", \"l2\" or \"ssim\"", text('"', metric, '"'));
}

// What the arguments say, all checked but for the pixels themselves: `frames` and the strides are still open.
inline PatchVideo expect_patches(const char* op, const Tensor& frames, const std::vector<int64_t>& patch,
                                 int64_t tubelet, const std::string& metric, const std::string& span, bool pad) {
  expect_frames(op, "frames", frames, "(B, T, C, H, W)");
  const int64_t T = frames.size(1), C = frames.size(2), H = frames.size(3), W = frames.size(4);
  VTOK_EXPECT(C >= 1 && H >= 1 && W >= 1, op, "frames with C, H and W >= 1", shape_text(frames));
  VTOK_EXPECT(patch.size() == 2, op, "patch of 2 sizes (ph, pw)", patch.size());
  const int64_t ph = patch[0], pw = patch[1];
  const auto pair = [](int64_t a, int64_t b) { return text("(", a, ", ", b, ")"); };
  VTOK_EXPECT(1 <= ph && 1 <= pw && ph <= H && pw <= W, op, text("patch from (1, 1) to (H, W)=", pair(H, W)),
              pair(ph, pw));
  VTOK_EXPECT(pad || (H % ph == 0 && W % pw == 0), op, text("(H, W) divisible by patch ", pair(ph, pw), " without pad"),
              pair(H, W));
  VTOK_EXPECT(tubelet >= 1, op, "tubelet >= 1", tubelet);
  VTOK_EXPECT(T % tubelet == 0, op, text("T divisible by tubelet=", tubelet), T);
  PatchVideo video{};
  video.metric = metric_of(op, metric);
  VTOK_EXPECT(span == "ends" || span == "whole", op, "span of \"ends\" or \"whole\"", text('"', span, '"'));
  video.videos = frames.size(0), video.steps = T / tubelet, video.C = C, video.H = H, video.W = W;
  video.tubelet = tubelet, video.ph = ph, video.pw = pw;
  video.h = (H - 1) / ph + 1, video.w = (W - 1) / pw + 1;
  video.whole = span == "whole";
  constexpr int64_t kMost = int64_t{1} << 24;
  VTOK_EXPECT(
      video.metric != PatchMetric::ssim || frames.scalar_type() != ScalarType::Byte || patch_values(video) <= kMost, op,
      text("patches of at most ", kMost, " values for ssim of uint8"), patch_values(video));
  return video;
}

inline Tensor dense_pixels(const Tensor& frames) {
  return frames.stride(4) == 1 || frames.size(4) == 1 ? frames : torch::stable::contiguous(frames);
}

inline void set_pixels(PatchVideo& video, const Tensor& dense) {
  video.frames = dense.const_data_ptr();
  video.batch = dense.stride(0), video.frame = dense.stride(1);
  video.channel = dense.stride(2), video.row = dense.stride(3);
}

inline ScalarType score_type(const Tensor& frames) {
  return frames.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body(T{}) with the storage type of the pixels.
template <class Body>
void dispatch_pixels(ScalarType type, const Body& body) {
  if (type == ScalarType::Byte) return body(uint8_t{});
  dispatch_float(type, body);
}

}  // namespace vtok
