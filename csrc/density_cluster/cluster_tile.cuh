// What the blocks of density_cluster share: which rows a tile has, and the squared distances of a tile of rows from a
// tile of others, some columns of both in shared memory at a time.
#pragma once

#include "common/dot_tiles.cuh"
#include "density_cluster/density_cluster.h"

namespace vtok {

constexpr int kClusterTile = kDotTile, kClusterThreads = kDotThreads;
constexpr uint32_t kNobody = 0xffffffffu;

struct ClusterNear {
  float square;  // the distance, D times too large
  uint32_t row;  // kNobody without one
};

template <class T>
struct ClusterArgs {
  DotRows<T> of;        // with a tile's rows as the span
  const int64_t* cu_k;  // [segments + 1]: any values, none leads outside a tensor
  int64_t k, neighbours;
  const bool* valid;    // [count], or all
  int64_t* assignment;  // [count]; until rows are assigned, the bits of the square to the nearest denser row, or -1
  int64_t* centres;     // [k]
  float* score;         // [count]
  ClusterNear* near;    // [count], the nearest other row; once rows are ranked, `row` says whether it is a centre
  float* mean;          // [count], of the least squares
  float* farthest;      // [tiles], the largest square of a tile's rows
};

// The rows [begin, end) of a group, and a tile of them from `first` on.
struct ClusterGroup {
  int64_t v, begin, end, tile;
  __device__ int64_t first() const { return begin + tile * kClusterTile; }
};

VTOK_DEVICE int64_t cluster_clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

template <class T>
VTOK_DEVICE ClusterGroup group_of_tile(const ClusterArgs<T>& args, int64_t tile) {
  const int64_t v = segment_of_tile(args.of, tile), begin = segment_begin(args.of, v);
  const int64_t end = segment_begin(args.of, v + 1), number = tile - first_tile(args.of, v);
  return {v, begin, end > begin ? end : begin, number < 0 ? 0 : number};
}

template <class T>
VTOK_DEVICE bool takes_part(const ClusterArgs<T>& args, const ClusterGroup& group, int64_t row) {
  return row < group.end && (!args.valid || args.valid[row]);
}

struct alignas(16) ClusterShared {
  DotShared dots;                                    // the rows and the others; of norms, the means of the others
  float squares[kClusterTile * (kClusterTile + 1)];  // of each row from each other
  int64_t sums[kClusterThreads / kWarp];
};

// Adds the columns in shared memory to a thread's squared distances, ascending.
VTOK_DEVICE void subtract_tiles(const DotShared& shared, int x, int y, float (&sums)[kDotEach][kDotEach]) {
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
        for (int c = 0; c < 4; ++c) {
          const float difference = a[i].x[c] - b.x[c];
          sums[i][j] = fmaf(difference, difference, sums[i][j]);
        }
    }
  }
}

// shared.squares of shared.dots.rows, which the block has written and waited for.
template <class T>
VTOK_DEVICE void square_rows(const DotRows<T>& of, ClusterShared& shared) {
  const int x = threadIdx.x % kDotSide, y = threadIdx.x / kDotSide;
  DotCargo cargo;
  float sums[kDotEach][kDotEach] = {};
  fetch_tiles(of, shared.dots, 0, cargo);
  for (int64_t column = 0; column < of.D; column += kDotDepth) {
    store_tiles(cargo, shared.dots);
    __syncthreads();
    fetch_tiles(of, shared.dots, column + kDotDepth, cargo);
    subtract_tiles(shared.dots, x, y, sums);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kDotEach; ++i)
#pragma unroll
    for (int j = 0; j < kDotEach; ++j)
      shared.squares[(y + i * kDotSide) * (kClusterTile + 1) + x + j * kDotSide] = sums[i][j];
  __syncthreads();
}

// Lets the rows meet a tile of others, `other` of which is the one that a thread of the first kClusterTile brings:
// these threads then visit(other row, its number, square) for their row in order.
template <class T, class Visit>
VTOK_DEVICE void meet_tile(const ClusterArgs<T>& args, ClusterShared& shared, int64_t other, const Visit& visit) {
  const bool in_tile = threadIdx.x < kClusterTile;
  if (in_tile) shared.dots.rows[kClusterTile + threadIdx.x] = other;
  if (!__syncthreads_or(in_tile && other >= 0)) return;
  square_rows(args.of, shared);
  if (in_tile && shared.dots.rows[threadIdx.x] >= 0)
    for (int j = 0; j < kClusterTile; ++j) {
      const int64_t row = shared.dots.rows[kClusterTile + j];
      const float square = shared.squares[threadIdx.x * (kClusterTile + 1) + j];
      if (row >= 0) visit(row, j, square == square ? square : infinite());
    }
  __syncthreads();
}

}  // namespace vtok
