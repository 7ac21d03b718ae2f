// The prefix sum of one number per thread over a block, for the kernels.
#pragma once

#include "common/kernel.h"

namespace vtok {

// Returns what the threads before this one brought; `total` is what all did. `sums` is shared room for a number per
// warp, free again on return. A one-dimensional block of kThreads; all of its threads must come.
template <int kThreads>
VTOK_DEVICE int64_t block_scan(int64_t mine, int64_t* sums, int64_t& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t sum = mine;
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const int64_t other = __shfl_up_sync(kFullMask, sum, by);
    if (lane >= by) sum += other;
  }
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) {
    before += w < warp ? sums[w] : 0;
    total += sums[w];
  }
  __syncthreads();
  return before + sum - mine;
}

}  // namespace vtok
