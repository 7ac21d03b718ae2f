// Dot products of many rows with many, for the CPU kernels whose sums need no canonical order. Rows are multiplied in
// blocks of as many pairs as a vector has lanes: a pair's products lie in the lanes of one vector, and the vectors of a
// block fold into one that holds the block's sums. Every pair is summed in the same order.
#pragma once

#include "common/isa.h"

namespace vtok {

constexpr int kBlockRows = kLanes >= 8 ? 4 : 2, kBlockColumns = kLanes / kBlockRows;

static inline vfloat multiply_add(vfloat a, vfloat b, vfloat sum) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
  return sum + a * b;
#endif
}

// Adds the halves of each part of 2h lanes; the parts of `a` and `b` come to alternate in parts of h lanes.
template <int h, int... I>
static inline vfloat fold_two(vfloat a, vfloat b, Lanes<I...>) {
  return (vfloat)__builtin_shufflevector(a, b, (I / (2 * h) * 2 * h + I % h + I / h % 2 * kLanes)...) +
         (vfloat)__builtin_shufflevector(a, b, (I / (2 * h) * 2 * h + I % h + I / h % 2 * kLanes + h)...);
}

// The sums over the lanes of 2h vectors, those of vector p in lane p in the end.
template <int h>
static inline vfloat fold_all(vfloat* x) {
#pragma GCC unroll 16
  for (int p = 0; p < h; ++p) x[p] = fold_two<h>(x[p], x[p + h], kAllLanes);
  if constexpr (h > 1) return fold_all<h / 2>(x);
  else return x[0];
}

// The dot products of a block of rows of a with one of b, kDepth values apart: pair (i, j) in lane i·kBlockColumns + j.
template <int kDepth>
static inline vfloat block_dots(const float* a, const float* b, int depth) {
  vfloat sums[kLanes] = {};
#pragma GCC unroll 1
  for (int at = 0; at < depth; at += kLanes) {
    vfloat y[kBlockColumns];
#pragma GCC unroll 16
    for (int j = 0; j < kBlockColumns; ++j) y[j] = load(b + j * kDepth + at);
#pragma GCC unroll 16
    for (int i = 0; i < kBlockRows; ++i) {
      const vfloat x = load(a + i * kDepth + at);
#pragma GCC unroll 16
      for (int j = 0; j < kBlockColumns; ++j)
        sums[i * kBlockColumns + j] = multiply_add(x, y[j], sums[i * kBlockColumns + j]);
    }
  }
  return fold_all<kLanes / 2>(sums);
}

}  // namespace vtok
