// A block takes a tile of a group's rows past the group: once for the density, once, with the rows alone whose nearest
// one is not denser, for the distance to the nearest denser row, and last past the centres. In between rows are ranked
// by score. No distance is kept beyond the nearest one.
#pragma once

#include "common/scan.h"
#include "density_cluster/cluster_tile.cuh"

namespace vtok {

constexpr int kClusterBlocks = 1024, kClusterShares = 32;  // blocks to aim at, and in how many others go at most

// Puts x into the ascending list that it belongs to, whose values lie a tile apart; the last one drops out.
VTOK_DEVICE void insert_least(float* list, int64_t n, float x) {
  int64_t at = n - 1;
  for (; at > 0 && list[(at - 1) * kClusterTile] > x; --at) list[at * kClusterTile] = list[(at - 1) * kClusterTile];
  list[at * kClusterTile] = x;
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads) cluster_density_kernel(ClusterArgs<T> args) {
  VTOK_SHARED(ClusterShared, shared);
  VTOK_DYNAMIC_SHARED(lists);
  const int64_t step = int64_t{gridDim.x} * kClusterThreads, all = args.of.count > args.k ? args.of.count : args.k;
  for (int64_t i = int64_t{blockIdx.x} * kClusterThreads + threadIdx.x; i < all; i += step) {
    if (i < args.of.count) args.assignment[i] = -1, args.score[i] = -infinite();
    if (i < args.k) args.centres[i] = -1;
  }
  if (args.of.segments == 0) return;
  const ClusterGroup group = group_of_tile(args, blockIdx.x);
  const int64_t row = group.first() + threadIdx.x;
  const bool mine = threadIdx.x < kClusterTile && takes_part(args, group, row);
  float* const least = reinterpret_cast<float*>(lists) + threadIdx.x;
  if (threadIdx.x < kClusterTile) {
    shared.dots.rows[threadIdx.x] = mine ? row : -1;
    for (int64_t p = 0; p < args.neighbours; ++p) least[p * kClusterTile] = infinite();
  }
  ClusterNear near{infinite(), kNobody};
  float farthest = 0;
  int64_t number = 0;
  for (int64_t first = group.begin; first < group.end && group.first() < group.end; first += kClusterTile) {
    const int64_t other = first + threadIdx.x;
    meet_tile(args, shared, takes_part(args, group, other) ? other : -1, [&](int64_t other_row, int, float square) {
      ++number;
      farthest = square > farthest ? square : farthest;
      if (square < least[(args.neighbours - 1) * kClusterTile]) insert_least(least, args.neighbours, square);
      if (square < near.square && other_row != row) near = {square, static_cast<uint32_t>(other_row)};
    });
  }
  if (mine) {
    const int64_t n = number < args.neighbours ? number : args.neighbours;
    float sum = 0;
    for (int64_t p = 0; p < n; ++p) sum += least[p * kClusterTile];
    args.mean[row] = cluster_mean(sum, n, args.of.D);
    args.near[row] = near;
  }
  if (threadIdx.x < kClusterTile) shared.dots.norms[threadIdx.x] = farthest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kClusterTile; ++i) farthest = shared.dots.norms[i] > farthest ? shared.dots.norms[i] : farthest;
    args.farthest[blockIdx.x] = farthest;
  }
}

// Tile t takes the t-th kClusterTile rows of the group that have a nearest one who is not denser, whoever is; the
// others know their distance already, and tile t notes it for its own. Blocks share out whom they meet.
template <class T>
__global__ void __launch_bounds__(kClusterThreads) cluster_delta_kernel(ClusterArgs<T> args) {
  VTOK_SHARED(ClusterShared, shared);
  auto* const found = reinterpret_cast<unsigned long long*>(args.assignment);
  const ClusterGroup group = group_of_tile(args, blockIdx.x);
  const int64_t begin = group.tile * kClusterTile, end = begin + kClusterTile;
  if (threadIdx.x < kClusterTile) shared.dots.rows[threadIdx.x] = -1;
  __syncthreads();
  int64_t seen = 0;
  for (int64_t first = group.begin; first < group.end && seen < end; first += kClusterThreads) {
    const int64_t row = first + threadIdx.x;
    bool open = takes_part(args, group, row);
    if (open) {
      const ClusterNear near = args.near[row];
      open = near.row >= args.of.count || !denser(args.mean[near.row], near.row, args.mean[row], row);
      const int64_t place = row - group.begin;
      if (!open && blockIdx.y == 0 && place >= begin && place < end) found[row] = bit_cast<uint32_t>(near.square);
    }
    int64_t total;
    const int64_t number = seen + block_scan<kClusterThreads>(open, shared.sums, total);
    if (open && number >= begin && number < end) shared.dots.rows[number - begin] = row;
    seen += total;
  }
  if (seen <= begin) return;
  __syncthreads();
  const int64_t row = threadIdx.x < kClusterTile ? shared.dots.rows[threadIdx.x] : -1;
  const float mean = row >= 0 ? args.mean[row] : 0.0f;
  float nearest = -1;
  const int64_t step = int64_t{gridDim.y} * kClusterTile;
  for (int64_t first = group.begin + int64_t{blockIdx.y} * kClusterTile; first < group.end; first += step) {
    const int64_t other = first + threadIdx.x;
    const bool takes = threadIdx.x < kClusterTile && takes_part(args, group, other);
    if (takes) shared.dots.norms[threadIdx.x] = args.mean[other];
    meet_tile(args, shared, takes ? other : -1, [&](int64_t other_row, int j, float square) {
      if (denser(shared.dots.norms[j], other_row, mean, row) && (nearest < 0 || square < nearest)) nearest = square;
    });
  }
  if (nearest >= 0) atomicMin(found + row, static_cast<unsigned long long>(bit_cast<uint32_t>(nearest)));
}

// Grows with the score; NaN has the least, but more than 0, which is for rows that take no part.
VTOK_DEVICE uint64_t cluster_key(float score) {
  const uint32_t bits = bit_cast<uint32_t>(score + 0.0f);  // no -0
  return score != score ? 1 : 2 + static_cast<uint64_t>(bits >> 31 ? ~bits : bits | 0x80000000u);
}

struct ClusterRanks {
  uint64_t keys[kClusterThreads];   // of some of the group's rows
  int64_t counts[kClusterThreads];  // rows that beat this thread's, in its share of the group
};

// Marks the rows that fewer others of their group beat than the group has slots.
template <class T>
__global__ void __launch_bounds__(kClusterThreads) cluster_rank_kernel(ClusterArgs<T> args) {
  VTOK_SHARED(ClusterRanks, shared);
  const ClusterGroup group = group_of_tile(args, blockIdx.x);
  if (group.first() >= group.end) return;
  float farthest = 0;
  for (int64_t t = blockIdx.x - group.tile, end = t + (group.end - group.begin + kClusterTile - 1) / kClusterTile;
       t < end && t < gridDim.x; ++t) {
    const float x = args.farthest[t];
    farthest = x > farthest ? x : farthest;
  }
  const auto score_of = [&](int64_t row) {
    const int64_t bits = args.assignment[row];
    const float nearest = bits < 0 ? farthest : bit_cast<float>(static_cast<uint32_t>(bits));
    return cluster_score(args.mean[row], nearest, args.of.D);
  };
  const int64_t row = group.first() + threadIdx.x % kClusterTile;
  const bool mine = takes_part(args, group, row);
  const float score = mine ? score_of(row) : 0.0f;
  const uint64_t key = mine ? cluster_key(score) : 0;
  const int part = threadIdx.x / kClusterTile * kClusterTile;
  int64_t count = 0;
  for (int64_t first = group.begin; first < group.end; first += kClusterThreads) {
    const int64_t other = first + threadIdx.x;
    shared.keys[threadIdx.x] = takes_part(args, group, other) ? cluster_key(score_of(other)) : 0;
    __syncthreads();
    for (int j = part; j < part + kClusterTile; ++j)
      count += shared.keys[j] > key || (shared.keys[j] == key && first + j < row);
    __syncthreads();
  }
  shared.counts[threadIdx.x] = count;
  __syncthreads();
  if (threadIdx.x >= kClusterTile || row >= group.end) return;
  for (int i = 1; i < kClusterThreads / kClusterTile; ++i) count += shared.counts[threadIdx.x + i * kClusterTile];
  const int64_t from = args.cu_k[group.v], to = args.cu_k[group.v + 1];
  const uint64_t wanted = to > from ? static_cast<uint64_t>(to) - static_cast<uint64_t>(from) : 0;
  args.near[row].row = mine && static_cast<uint64_t>(count) < wanted;
  if (mine) args.score[row] = score;
}

using ClusterSums = int64_t[kClusterThreads / kWarp];

// A block lists the centres of a group in its slots.
template <class T>
__global__ void __launch_bounds__(kClusterThreads) cluster_list_kernel(ClusterArgs<T> args) {
  VTOK_SHARED(ClusterSums, sums);
  const int64_t begin = cluster_clamp(args.of.cu_seqlens[blockIdx.x], 0, args.of.count);
  const int64_t end = cluster_clamp(args.of.cu_seqlens[blockIdx.x + 1], begin, args.of.count);
  const int64_t last = cluster_clamp(args.cu_k[blockIdx.x + 1], 0, args.k);
  int64_t slot = cluster_clamp(args.cu_k[blockIdx.x], 0, args.k);
  for (int64_t first = begin; first < end && slot < last; first += kClusterThreads) {
    const int64_t row = first + threadIdx.x;
    const bool centre = row < end && args.near[row].row == 1;
    int64_t total;
    const int64_t at = slot + block_scan<kClusterThreads>(centre, sums, total);
    if (centre && at < last) args.centres[at] = row;
    slot += total;
  }
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads) cluster_assign_kernel(ClusterArgs<T> args) {
  VTOK_SHARED(ClusterShared, shared);
  const ClusterGroup group = group_of_tile(args, blockIdx.x);
  if (group.first() >= group.end) return;
  const int64_t row = group.first() + threadIdx.x;
  const bool mine = threadIdx.x < kClusterTile && takes_part(args, group, row);
  if (threadIdx.x < kClusterTile) shared.dots.rows[threadIdx.x] = mine ? row : -1;
  float nearest = 0;
  int64_t slot = -1;
  const int64_t end = cluster_clamp(args.cu_k[group.v + 1], 0, args.k);
  for (int64_t first = cluster_clamp(args.cu_k[group.v], 0, args.k); first < end; first += kClusterTile) {
    const int64_t at = first + threadIdx.x;
    meet_tile(args, shared, threadIdx.x < kClusterTile && at < end ? args.centres[at] : -1,
              [&](int64_t centre, int j, float square) {
                const float x = centre == row ? -1.0f : square;
                if (slot < 0 || x < nearest) nearest = x, slot = first + j;
              });
  }
  if (mine) args.assignment[row] = slot;
}

inline int64_t cluster_tiles(int64_t count, int64_t groups) { return count / kClusterTile + groups; }

inline int64_t cluster_workspace_bytes(int64_t count, int64_t groups) {
  return count * static_cast<int64_t>(sizeof(ClusterNear) + sizeof(float)) +
         cluster_tiles(count, groups) * static_cast<int64_t>(sizeof(float));
}

// count < 2^32; the workspace is 8-byte aligned. The grid follows from sizes alone: the host knows no boundaries.
template <class T>
cudaError_t cluster_launch(const T* rows, int64_t count, int64_t stride, int64_t D, const int64_t* cu_seqlens,
                           const int64_t* cu_k, int64_t groups, int64_t k, int64_t neighbours, const bool* valid,
                           int64_t* assignment, int64_t* centres, float* score, void* workspace, cudaStream_t stream) {
  auto* const near = static_cast<ClusterNear*>(workspace);
  auto* const mean = reinterpret_cast<float*>(near + count);
  const DotRows<T> of{rows, count, stride, D, cu_seqlens, groups, kClusterTile};
  const ClusterArgs<T> args{of, cu_k, k, neighbours, valid, assignment, centres, score, near, mean, mean + count};
  const int64_t tiles = cluster_tiles(count, groups), wanted = ceil_div(kClusterBlocks, tiles + 1);
  const int64_t useful = ceil_div(count, kClusterTile) + 1, most = useful < kClusterShares ? useful : kClusterShares;
  const dim3 block(kClusterThreads), each(tiles ? tiles : 1), shared_out(tiles, wanted < most ? wanted : most);
  const size_t lists = sizeof(float) * kClusterTile * neighbours;
  cudaError_t error = VTOK_LAUNCH((cluster_density_kernel<T>), each, block, lists, stream, args);
  if (error != cudaSuccess || groups == 0 || count == 0) return error;
  error = VTOK_LAUNCH((cluster_delta_kernel<T>), shared_out, block, 0, stream, args);
  if (error == cudaSuccess) error = VTOK_LAUNCH((cluster_rank_kernel<T>), each, block, 0, stream, args);
  if (error == cudaSuccess) error = VTOK_LAUNCH((cluster_list_kernel<T>), dim3(groups), block, 0, stream, args);
  if (error != cudaSuccess) return error;
  return VTOK_LAUNCH((cluster_assign_kernel<T>), each, block, 0, stream, args);
}

VTOK_HOST_EXPORT("density_cluster_float32", cluster_launch<float>)
VTOK_HOST_EXPORT("density_cluster_float16", cluster_launch<f16>)
VTOK_HOST_EXPORT("density_cluster_bfloat16", cluster_launch<bf16>)
VTOK_HOST_EXPORT("density_cluster_float64", cluster_launch<double>)

}  // namespace vtok
