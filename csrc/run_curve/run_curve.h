// What the CPU's and CUDA's kernels of run_curve have in common: which rows a video's sites have, and the hull.
#pragma once

#include "common/half.h"

namespace vtok {

constexpr int kCurveWord = 64;  // frames of a mask's word
VTOK_BOTH int64_t curve_words(int64_t frames) { return (frames + kCurveWord - 1) / kCurveWord; }

// The rows of a video: those of its `sites` sites, `frames` each, then rows that are sites of their own.
struct CurveVideo {
  int64_t begin, end, sites, frames;
};

// Of rows [begin, end) with `given` rows to a frame; a video longer than `most` frames has none.
VTOK_BOTH CurveVideo curve_video(int64_t begin, int64_t end, int64_t given, int64_t extra_rows, int64_t most) {
  const int64_t grid = end - begin - (extra_rows < end - begin ? extra_rows : end - begin);
  const int64_t frames = given > 0 ? grid / given : 0;
  return frames > 0 && frames <= most ? CurveVideo{begin, end, given, frames} : CurveVideo{begin, end, 0, 0};
}

// A site's points D(1) to D(frames), made never to rise, as its curve; and what each run gains on their lower convex
// hull, whose corners are found in `corners` [frames]. Both NaN where the site is not finite.
VTOK_BOTH void write_hull(float* points, int64_t frames, bool finite, int32_t* corners, float* curve, float* gain) {
  const float nan = bit_cast<float>(0x7fc00000u);
  int64_t count = 0;
  for (int32_t k = 0; k < frames; ++k) {
    if (k > 0 && !(points[k] < points[k - 1])) points[k] = points[k - 1];
    curve[k] = finite ? points[k] : nan;
    for (; count > 1; --count) {
      const int32_t a = corners[count - 2], b = corners[count - 1];
      const double before = static_cast<double>(points[a]) - points[b];
      if (before * (k - b) > (static_cast<double>(points[b]) - points[k]) * (b - a)) break;
    }
    corners[count++] = k;
  }
  gain[0] = bit_cast<float>(0x7f800000u);
  for (int64_t c = 1; c < count; ++c) {
    const int32_t a = corners[c - 1], b = corners[c];
    const auto each = static_cast<float>((static_cast<double>(points[a]) - points[b]) / (b - a));
    for (int32_t k = a + 1; k <= b; ++k) gain[k] = finite ? each : nan;
  }
}

}  // namespace vtok
