// Dot products of many rows with many others: a block multiplies a tile of rows with another, some columns of both in
// shared memory at a time. Each pair is summed in the same order, and so are the norms.
#pragma once

#include "common/canonical.cuh"

namespace vtok {

constexpr int kDotTile = 64, kDotDepth = 32;                  // rows and columns of a tile
constexpr int kDotSide = 16, kDotEach = kDotTile / kDotSide;  // threads along a side, rows of each
constexpr int kDotThreads = kDotSide * kDotSide;
constexpr int kDotPitch = kDotDepth + 4;  // 16-byte reads of 8 neighbouring rows meet no bank twice
constexpr int kDotLoads = kDotTile * kDotDepth / kDotThreads;

template <class T>
struct DotRows {
  const T* rows;  // [count, D], rows `stride` values apart
  int64_t count, stride, D;
  const int64_t* cu_seqlens;  // [segments + 1]: any values, none leads outside a tensor
  int64_t segments;
  int64_t span;  // rows of a segment that make at most one tile
};

struct alignas(16) Four {
  float x[4];
};

struct alignas(16) DotShared {
  float tiles[2 * kDotTile * kDotPitch];  // the columns of one tile's rows, then of the other's
  int64_t rows[2 * kDotTile];             // where they lie, -1 beyond the last
  float norms[2 * kDotTile];              // squared
};

template <class T>
VTOK_DEVICE int64_t segment_begin(const DotRows<T>& of, int64_t v) {
  const int64_t begin = of.cu_seqlens[v];
  return begin < 0 ? 0 : begin < of.count ? begin : of.count;
}

// The number of a segment's first tile: every segment before it leaves room for one that is not full.
template <class T>
VTOK_DEVICE int64_t first_tile(const DotRows<T>& of, int64_t v) {
  return segment_begin(of, v) / of.span + v;
}

template <class T>
VTOK_DEVICE int64_t segment_of_tile(const DotRows<T>& of, int64_t tile) {
  int64_t low = 0, high = of.segments;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_tile(of, middle) <= tile) low = middle;
    else high = middle;
  }
  return low;
}

// What a thread carries from global memory to the tiles: half of it of the one, half of the other.
struct DotCargo {
  float x[2 * kDotLoads];
};

template <class T>
VTOK_DEVICE void fetch_tiles(const DotRows<T>& of, const DotShared& shared, int64_t column, DotCargo& cargo) {
  const int64_t at = column + threadIdx.x % kDotDepth;
#pragma unroll
  for (int i = 0; i < 2 * kDotLoads; ++i) {
    const int64_t row = shared.rows[threadIdx.x / kDotDepth + i * (kDotThreads / kDotDepth)];
    cargo.x[i] = row >= 0 && at < of.D ? to_float(of.rows[row * of.stride + at]) : 0.0f;
  }
}

VTOK_DEVICE void store_tiles(const DotCargo& cargo, DotShared& shared) {
  float* const to = shared.tiles + threadIdx.x / kDotDepth * kDotPitch + threadIdx.x % kDotDepth;
#pragma unroll
  for (int i = 0; i < 2 * kDotLoads; ++i) to[i * (kDotThreads / kDotDepth) * kDotPitch] = cargo.x[i];
}

VTOK_DEVICE Four read_four(const float* from) { return *reinterpret_cast<const Four*>(from); }

// Adds the columns in shared memory to a thread's dot products, ascending.
VTOK_DEVICE void multiply_tiles(const DotShared& shared, int x, int y, float (&dots)[kDotEach][kDotEach]) {
#pragma unroll 2
  for (int k = 0; k < kDotDepth; k += 4) {
    Four a[kDotEach];
#pragma unroll
    for (int i = 0; i < kDotEach; ++i) a[i] = read_four(shared.tiles + (y + i * kDotSide) * kDotPitch + k);
#pragma unroll
    for (int j = 0; j < kDotEach; ++j) {
      const Four b = read_four(shared.tiles + (kDotTile + x + j * kDotSide) * kDotPitch + k);
#pragma unroll
      for (int i = 0; i < kDotEach; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) dots[i][j] = fmaf(a[i].x[c], b.x[c], dots[i][j]);
    }
  }
}

// The same for the squared norm of one row of the tiles, in the same order: identical rows have a cosine of exactly 1.
VTOK_DEVICE float add_norm(const float* row, float norm) {
#pragma unroll 2
  for (int k = 0; k < kDotDepth; k += 4) {
    const Four x = read_four(row + k);
#pragma unroll
    for (int c = 0; c < 4; ++c) norm = fmaf(x.x[c], x.x[c], norm);
  }
  return norm;
}

// The norms of the rows that shared.rows names, and a thread's dot products: of the first tile's rows y + i·kDotSide
// with the other's x + j·kDotSide. The whole block comes; shared.rows may be as fresh as the last barrier.
template <class T>
VTOK_DEVICE void multiply_rows(const DotRows<T>& of, DotShared& shared, int x, int y,
                               float (&dots)[kDotEach][kDotEach]) {
  const int thread = threadIdx.x;
  DotCargo cargo;
  float norm = 0;
  fetch_tiles(of, shared, 0, cargo);
  for (int64_t column = 0; column < of.D; column += kDotDepth) {
    store_tiles(cargo, shared);
    __syncthreads();
    fetch_tiles(of, shared, column + kDotDepth, cargo);
    if (thread < 2 * kDotTile) norm = add_norm(shared.tiles + thread * kDotPitch, norm);
    multiply_tiles(shared, x, y, dots);
    __syncthreads();
  }
  if (thread < 2 * kDotTile) shared.norms[thread] = norm;
  __syncthreads();
}

}  // namespace vtok
