// Dot products of many rows with many others on the CPU. Tiles of both are widened into the cache, some columns at a
// time, and multiplied block by block.
#pragma once

#include "common/dots.h"

namespace vtok {

constexpr int64_t kDotRows = 128, kDotOthers = 64;  // of a tile

struct DotCall {
  const void* rows;  // of D values, `stride` values apart
  int64_t stride, D;
  float* norms;  // [rows], squared
};

namespace {

constexpr int kDepth = 256;  // columns of a tile
constexpr int kRowBlocks = kDotRows / kBlockRows, kColumnBlocks = kDotOthers / kBlockColumns;

struct DotWork {
  alignas(64) float row_columns[kDotRows * kDepth];
  alignas(64) float other_columns[kDotOthers * kDepth];
  alignas(64) vfloat dots[kRowBlocks * kColumnBlocks];  // pair (i, j) of a block in lane i·kBlockColumns + j
  int64_t rows[kDotRows], others[kDotOthers];           // which ones
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline vfloat square_roots(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// dot / max(sqrt(norm_a * norm_b), eps) of squared norms; NaN stays NaN.
inline vfloat cosines(vfloat dots, vfloat norm_a, vfloat norm_b, float eps) {
  const vfloat root = square_roots(norm_a * norm_b);
  return dots / (root < eps ? vfloat{} + eps : root);
}

inline void widen_part(const double* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}
template <class T>
inline void widen_part(const T* from, float* to, int64_t n) {
  widen_row(from, to, n);
}

// Columns [column, column + width) of one row, filled up with zeros to whole vectors.
template <class T>
inline void widen_columns(const DotCall& call, int64_t row, int64_t column, int64_t width, float* to) {
  widen_part(static_cast<const T*>(call.rows) + row * call.stride + column, to, width);
  for (int64_t i = width; i % kLanes; ++i) to[i] = 0;
}

// The squared norms of rows [begin, end), in the order of block_dots: identical rows have a cosine of exactly 1.
template <class T>
void norms_of(const DotCall& call, int64_t begin, int64_t end) {
  float part[kDepth];
  for (int64_t row = begin; row < end; ++row) {
    call.norms[row] = 0;
    for (int64_t column = 0; column < call.D; column += kDepth) {
      const int64_t width = smaller(kDepth, call.D - column);
      widen_columns<T>(call, row, column, width, part);
      vfloat sums[kLanes] = {};
      for (int64_t at = 0; at < width; at += kLanes) sums[0] = multiply_add(load(part + at), load(part + at), sums[0]);
      call.norms[row] += fold_all<kLanes / 2>(sums)[0];
    }
  }
}

// The dot products of the first `rows` of work.rows with the first `others` of work.others, both at least 1; blocks
// that reach beyond take the last one again. `fresh`: the rows have changed since the last call.
template <class T>
void dots_of(const DotCall& call, int64_t rows, int64_t others, bool fresh, DotWork& work) {
  const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t column_blocks = (others + kBlockColumns - 1) / kBlockColumns;
  for (int64_t i = 0; i < row_blocks * kColumnBlocks; ++i) work.dots[i] = vfloat{};
  for (int64_t column = 0; column < call.D; column += kDepth) {
    const int64_t width = smaller(kDepth, call.D - column);
    for (int64_t i = 0; i < row_blocks * kBlockRows && (fresh || call.D > kDepth); ++i)
      widen_columns<T>(call, work.rows[smaller(i, rows - 1)], column, width, work.row_columns + i * kDepth);
    for (int64_t j = 0; j < column_blocks * kBlockColumns; ++j)
      widen_columns<T>(call, work.others[smaller(j, others - 1)], column, width, work.other_columns + j * kDepth);
    for (int64_t i = 0; i < row_blocks; ++i)
      for (int64_t j = 0; j < column_blocks; ++j) {
        vfloat& dots = work.dots[i * kColumnBlocks + j];
        dots = dots + block_dots<kDepth>(work.row_columns + i * kBlockRows * kDepth,
                                         work.other_columns + j * kBlockColumns * kDepth, static_cast<int>(width));
      }
  }
}

}  // namespace
}  // namespace vtok
