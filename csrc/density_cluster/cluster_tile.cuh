// What the blocks of density_cluster share: which rows a tile has, and the squared distances of a tile of rows from a
// tile of others, some columns of both in shared memory at a time.
#pragma once

#include "common/dot_tiles.cuh"
#include "density_cluster/density_cluster.h"

namespace vtok {

constexpr int kClusterTile = 64, kClusterDepth = 32;                          // rows and columns of a tile
constexpr int kClusterSide = 16, kClusterEach = kClusterTile / kClusterSide;  // threads along a side, rows of each
constexpr int kClusterThreads = kClusterSide * kClusterSide;
constexpr int kClusterPitch = kClusterDepth + 4;  // 16-byte reads of 8 neighbouring rows meet no bank twice
constexpr int kClusterLoads = kClusterTile * kClusterDepth / kClusterThreads;
constexpr uint32_t kNobody = 0xffffffffu;

struct ClusterNear {
  float square;  // the distance, D times too large
  uint32_t row;  // kNobody without one
};

template <class T>
struct ClusterArgs {
  const T* rows;  // [count, D], rows `stride` values apart
  int64_t count, stride, D;
  const int64_t *cu_seqlens, *cu_k;  // [groups + 1]: any values, none leads outside a tensor
  int64_t groups, k, neighbours;
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

// The number of a group's first tile: every group before it leaves room for one that is not full.
template <class T>
VTOK_DEVICE int64_t first_cluster_tile(const ClusterArgs<T>& args, int64_t v) {
  return cluster_clamp(args.cu_seqlens[v], 0, args.count) / kClusterTile + v;
}

template <class T>
VTOK_DEVICE ClusterGroup group_of_tile(const ClusterArgs<T>& args, int64_t tile) {
  int64_t low = 0, high = args.groups;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_cluster_tile(args, middle) <= tile) low = middle;
    else high = middle;
  }
  const int64_t begin = cluster_clamp(args.cu_seqlens[low], 0, args.count),
                number = tile - first_cluster_tile(args, low);
  return {low, begin, cluster_clamp(args.cu_seqlens[low + 1], begin, args.count), number < 0 ? 0 : number};
}

template <class T>
VTOK_DEVICE bool takes_part(const ClusterArgs<T>& args, const ClusterGroup& group, int64_t row) {
  return row < group.end && (!args.valid || args.valid[row]);
}

struct alignas(16) ClusterShared {
  float tiles[2 * kClusterTile * kClusterPitch];     // columns of rows, then of others
  float squares[kClusterTile * (kClusterTile + 1)];  // of each row from each other
  int64_t rows[kClusterTile], others[kClusterTile];  // where they lie, -1 where there is none
  float means[kClusterTile];                         // of the others
  int64_t sums[kClusterThreads / kWarp];
};

// What a thread carries from global memory to the tiles: half of it of rows, half of others.
struct ClusterCargo {
  float x[2 * kClusterLoads];
};

template <class T>
VTOK_DEVICE void fetch_columns(const ClusterArgs<T>& args, const ClusterShared& shared, int64_t column,
                               ClusterCargo& cargo) {
  const int64_t at = column + threadIdx.x % kClusterDepth;
#pragma unroll
  for (int i = 0; i < 2 * kClusterLoads; ++i) {
    const int place = threadIdx.x / kClusterDepth + i % kClusterLoads * (kClusterThreads / kClusterDepth);
    const int64_t row = (i < kClusterLoads ? shared.rows : shared.others)[place];
    cargo.x[i] = row >= 0 && at < args.D ? to_float(args.rows[row * args.stride + at]) : 0.0f;
  }
}

VTOK_DEVICE void store_columns(const ClusterCargo& cargo, ClusterShared& shared) {
  float* const to = shared.tiles + threadIdx.x / kClusterDepth * kClusterPitch + threadIdx.x % kClusterDepth;
#pragma unroll
  for (int i = 0; i < 2 * kClusterLoads; ++i) to[i * (kClusterThreads / kClusterDepth) * kClusterPitch] = cargo.x[i];
}

// Adds the columns in shared memory to a thread's squared distances, ascending.
VTOK_DEVICE void add_columns(const ClusterShared& shared, int x, int y, float (&sums)[kClusterEach][kClusterEach]) {
#pragma unroll 2
  for (int k = 0; k < kClusterDepth; k += 4) {
    Four a[kClusterEach];
#pragma unroll
    for (int i = 0; i < kClusterEach; ++i) a[i] = read_four(shared.tiles + (y + i * kClusterSide) * kClusterPitch + k);
#pragma unroll
    for (int j = 0; j < kClusterEach; ++j) {
      const Four b = read_four(shared.tiles + (kClusterTile + x + j * kClusterSide) * kClusterPitch + k);
#pragma unroll
      for (int i = 0; i < kClusterEach; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float difference = a[i].x[c] - b.x[c];
          sums[i][j] = fmaf(difference, difference, sums[i][j]);
        }
    }
  }
}

// shared.squares of shared.rows and shared.others, which the block has written and waited for.
template <class T>
VTOK_DEVICE void square_tile(const ClusterArgs<T>& args, ClusterShared& shared) {
  const int x = threadIdx.x % kClusterSide, y = threadIdx.x / kClusterSide;
  ClusterCargo cargo;
  float sums[kClusterEach][kClusterEach] = {};
  fetch_columns(args, shared, 0, cargo);
  for (int64_t column = 0; column < args.D; column += kClusterDepth) {
    store_columns(cargo, shared);
    __syncthreads();
    fetch_columns(args, shared, column + kClusterDepth, cargo);
    add_columns(shared, x, y, sums);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kClusterEach; ++i)
#pragma unroll
    for (int j = 0; j < kClusterEach; ++j)
      shared.squares[(y + i * kClusterSide) * (kClusterTile + 1) + x + j * kClusterSide] = sums[i][j];
  __syncthreads();
}

// Lets shared.rows meet a tile of others, `other` of which is the one that a thread of the first kClusterTile brings:
// these threads then visit(other row, its number, square) for their row in order.
template <class T, class Visit>
VTOK_DEVICE void meet_tile(const ClusterArgs<T>& args, ClusterShared& shared, int64_t other, const Visit& visit) {
  if (threadIdx.x < kClusterTile) shared.others[threadIdx.x] = other;
  if (!__syncthreads_or(threadIdx.x < kClusterTile && other >= 0)) return;
  square_tile(args, shared);
  if (threadIdx.x < kClusterTile && shared.rows[threadIdx.x] >= 0)
    for (int j = 0; j < kClusterTile; ++j) {
      const float square = shared.squares[threadIdx.x * (kClusterTile + 1) + j];
      if (shared.others[j] >= 0) visit(shared.others[j], j, square == square ? square : infinite());
    }
  __syncthreads();
}

}  // namespace vtok
