// What the search looks at and prefers, as the CPU and CUDA share it.
#pragma once

#include "common/patch.h"

namespace vtok {

struct MotionSearch {
  PatchVideo video;
  int64_t ry, rx;  // farthest vector, below (H, W)
  double bias;
  void* motion;      // [videos, steps, h, w] of float32, or of float64 for float64 pixels
  int64_t* vectors;  // [videos, steps, h, w, 2]
};

// Whether the visible `part` of a patch that begins at `at` stays inside when it moves.
VTOK_BOTH bool stays_inside(int64_t at, int64_t part, int64_t size, int64_t by) {
  return at + by >= 0 && at + part + by <= size;
}

// NaN is larger than any cost.
template <class A>
VTOK_BOTH bool costs_less(A a, A b) {
  return a < b || (b != b && a == a);
}

// Whether the best of the other vectors, at NaN where there is none, is taken instead of (0, 0).
template <class A>
VTOK_BOTH bool moves(A best, A still, A bias) {
  return best + bias < still || (still != still && best == best);
}

}  // namespace vtok
