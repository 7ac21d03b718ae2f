// Patches of pixels and their distances (vtok/ops/_patch.py), as the CPU and CUDA share them.
#pragma once

#include "common/half.h"

namespace vtok {

enum class PatchMetric : int32_t { l1, mse, l2, ssim };

// Frames [B, T, C, H, W] as steps of patches.
struct PatchVideo {
  const void* frames;
  int64_t batch, frame, channel, row;  // strides in values; a row of pixels is dense
  int64_t videos, steps, C, H, W;
  int64_t tubelet, ph, pw, h, w;  // frames of a step, pixels of a patch, patches of a frame
  bool whole;                     // frame by frame; else the last frame of a step against the first of the reference
  PatchMetric metric;
};

VTOK_BOTH int64_t compared_frames(const PatchVideo& video) { return video.whole ? video.tubelet : 1; }
VTOK_BOTH int64_t patch_values(const PatchVideo& video) {
  return video.C * compared_frames(video) * video.ph * video.pw;
}

// Patches side by side: `rows` x `columns` pixels of the image from the corner on, what lies beyond is zero.
struct PatchStrip {
  int64_t x, patches;  // the first patch's column of pixels
  int64_t rows, columns;
};
VTOK_BOTH PatchStrip patch_strip(const PatchVideo& video, int64_t py, int64_t px, int64_t patches) {
  const int64_t rows = video.H - py * video.ph;
  return {px * video.pw, patches, rows < video.ph ? rows : video.ph, video.W - px * video.pw};
}

// The pixels of some frames from a corner on.
template <class T>
struct PatchPixels {
  const T* at;
  int64_t frame, channel, row;  // strides
};
template <class T>
VTOK_BOTH PatchPixels<T> pixels_of(const PatchVideo& video, int64_t b, int64_t frame, int64_t py, int64_t px) {
  const int64_t first = b * video.batch + frame * video.frame + py * video.ph * video.row + px * video.pw;
  return {static_cast<const T*>(video.frames) + first, video.frame, video.channel, video.row};
}
// Of step t, what is compared with a reference.
template <class T>
VTOK_BOTH PatchPixels<T> step_pixels(const PatchVideo& video, int64_t b, int64_t t, int64_t py, int64_t px) {
  return pixels_of<T>(video, b, t * video.tubelet + (video.whole ? 0 : video.tubelet - 1), py, px);
}
// Of step t as a reference.
template <class T>
VTOK_BOTH PatchPixels<T> reference_pixels(const PatchVideo& video, int64_t b, int64_t t, int64_t py, int64_t px) {
  return pixels_of<T>(video, b, t * video.tubelet, py, px);
}

// --- from sums to scores: no product is contracted with a sum, by the flags of every compiler ---------------------

VTOK_BOTH float patch_root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
VTOK_BOTH double patch_root(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// From the sum of absolute or squared differences of P values.
template <class A>
VTOK_BOTH A patch_distance(PatchMetric metric, A sum, int64_t P) {
  return metric == PatchMetric::l2 ? patch_root(sum) : sum / static_cast<A>(P);
}

// 1 - SSIM in [0, 2] from the moments and the larger spread of values; NaN stays NaN.
template <class A>
VTOK_BOTH A ssim_distance(A mx, A mr, A vx, A vr, A c, A spread) {
  const A L = spread < 1 ? 1 : spread;
  const A l1 = static_cast<A>(0.01) * L, l2 = static_cast<A>(0.03) * L, c1 = l1 * l1, c2 = l2 * l2;
  const A product = (mx * mx + mr * mr + c1) * (vx + vr + c2), least = static_cast<A>(1e-12);
  const A d = 1 - (2 * mx * mr + c1) * (2 * c + c2) / (product < least ? least : product);
  return d < 0 ? 0 : d > 2 ? 2 : d;
}

// From the sums of x, r, x², r², x·r of P integers; everything but the last steps is exact.
VTOK_BOTH float ssim_of_integers(int64_t x, int64_t r, int64_t xx, int64_t rr, int64_t xr, int64_t spread, int64_t P) {
  const float p = static_cast<float>(P), square = p * p;
  return ssim_distance(static_cast<float>(x) / p, static_cast<float>(r) / p,
                       static_cast<float>(P * xx - x * x) / square, static_cast<float>(P * rr - r * r) / square,
                       static_cast<float>(P * xr - x * r) / square, static_cast<float>(spread));
}

}  // namespace vtok
