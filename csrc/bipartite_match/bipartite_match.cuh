// A block multiplies a tile of sources with tiles of destinations, and each thread keeps the best of its pairs. The
// tiles of destinations are shared out among several blocks, whose bests meet in an atomic maximum of integer keys, so
// that their order changes nothing.
#pragma once

#include "bipartite_match/bipartite_match.h"
#include "common/dot_tiles.cuh"

namespace vtok {

constexpr int kMatchThreads = kDotThreads;
constexpr int kMatchBlocks = 1024, kMatchShares = 32;  // blocks to aim at, and in how many the destinations go at most

template <class T>
struct MatchArgs {
  DotRows<T> of;
  MatchRule rule;
  float eps;
  float* best;      // [count]
  int64_t* target;  // [count], keys at first: a cosine in order above, the row's complement below; 0 is none
};

// Keys grow with the cosine, then with a lower row; NaN's are below those of numbers, and 0 is no destination at all.
VTOK_DEVICE unsigned long long match_key(float cosine, int64_t row) {
  const uint32_t bits = bit_cast<uint32_t>(cosine + 0.0f);  // no -0
  const uint32_t order = cosine != cosine ? 0u : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(order) << 32 | (0xffffffffu - static_cast<uint32_t>(row));
}
VTOK_DEVICE float cosine_of_key(unsigned long long key) {
  const uint32_t order = static_cast<uint32_t>(key >> 32);
  return bit_cast<float>(order == 0 ? 0x7fc00000u : order >> 31 ? order & 0x7fffffffu : ~order);
}
VTOK_DEVICE int64_t row_of_key(unsigned long long key) { return 0xffffffffu - static_cast<uint32_t>(key); }

template <class T>
__global__ void __launch_bounds__(kMatchThreads) match_clear_kernel(MatchArgs<T> args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMatchThreads + threadIdx.x;
  if (row < args.of.count) args.target[row] = 0;
}

template <class T>
__global__ void __launch_bounds__(kMatchThreads) match_tiles_kernel(MatchArgs<T> args) {
  VTOK_SHARED(DotShared, shared);
  const int thread = threadIdx.x, x = thread % kDotSide, y = thread / kDotSide;
  const int64_t v = segment_of_tile(args.of, blockIdx.x), begin = segment_begin(args.of, v);
  const int64_t end = segment_begin(args.of, v + 1), rows = end > begin ? end - begin : 0;
  const int64_t guarded = args.rule.guarded < rows ? args.rule.guarded : rows;
  const int64_t source =
      sources_in(args.rule, guarded) + (static_cast<int64_t>(blockIdx.x) - first_tile(args.of, v)) * kDotTile;
  const int64_t sources = sources_in(args.rule, rows) - source, destinations = destinations_in(args.rule, rows);
  if (sources <= 0) return;

  float best[kDotEach];
  int64_t at[kDotEach];
#pragma unroll
  for (int i = 0; i < kDotEach; ++i) at[i] = -1;
  int64_t first = destinations_in(args.rule, guarded) + static_cast<int64_t>(blockIdx.y) * kDotTile;
  for (; first < destinations; first += static_cast<int64_t>(gridDim.y) * kDotTile) {
    if (thread < kDotTile) shared.rows[thread] = thread < sources ? begin + source_row(args.rule, source + thread) : -1;
    else if (const int64_t number = first + thread - kDotTile; thread < 2 * kDotTile)
      shared.rows[thread] = number < destinations ? begin + destination_row(args.rule, number) : -1;
    __syncthreads();
    float dots[kDotEach][kDotEach] = {};
    multiply_rows(args.of, shared, x, y, dots);
#pragma unroll
    for (int i = 0; i < kDotEach; ++i) {
#pragma unroll
      for (int j = 0; j < kDotEach; ++j) {
        const int other = kDotTile + x + j * kDotSide;
        const int64_t row = shared.rows[other];
        if (row < 0) continue;
        const float cosine =
            canonical_cosine(dots[i][j], shared.norms[y + i * kDotSide], shared.norms[other], args.eps);
        if (at[i] < 0 || (cosine == cosine && !(cosine <= best[i]))) best[i] = cosine, at[i] = row;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kDotEach; ++i) {
    unsigned long long key = at[i] < 0 ? 0 : match_key(best[i], at[i]);
#pragma unroll
    for (int by = kDotSide / 2; by; by /= 2) {
      const unsigned long long other = __shfl_xor_sync(kFullMask, key, by);
      key = other > key ? other : key;
    }
    const int64_t number = y + i * kDotSide;
    if (x == 0 && key && number < sources)
      atomicMax(reinterpret_cast<unsigned long long*>(args.target) + begin + source_row(args.rule, source + number),
                key);
  }
}

template <class T>
__global__ void __launch_bounds__(kMatchThreads) match_finish_kernel(MatchArgs<T> args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMatchThreads + threadIdx.x;
  if (row >= args.of.count) return;
  bool looks = false;
  if (args.of.segments > 0) {
    const int64_t v = find_video(args.of.cu_seqlens, args.of.segments, row), i = row - segment_begin(args.of, v);
    looks = i >= args.rule.guarded && row < segment_begin(args.of, v + 1) && i % args.rule.split != args.rule.split - 1;
  }
  const auto key = static_cast<unsigned long long>(args.target[row]);
  const bool found = looks && key != 0;
  args.best[row] = found ? cosine_of_key(key) : -INFINITY;
  args.target[row] = found ? row_of_key(key) : looks ? -1 : row;
}

// 0 < count < 2^32. The grid follows from sizes alone: the host knows no boundaries.
template <class T>
cudaError_t match_launch(const T* rows, int64_t count, int64_t stride, int64_t D, const int64_t* cu_seqlens,
                         int64_t segments, int64_t split, int64_t guarded, double eps, float* best, int64_t* target,
                         cudaStream_t stream) {
  const int64_t span = kDotTile + kDotTile / (split - 1), tiles = count / span + segments;
  const MatchArgs<T> args{{rows, count, stride, D, cu_seqlens, segments, span},
                          MatchRule{split, guarded},
                          static_cast<float>(eps),
                          best,
                          target};
  const int64_t wanted = ceil_div(kMatchBlocks, tiles + 1), useful = ceil_div(count, kDotTile) / 2 + 1;
  const int64_t most = useful < kMatchShares ? useful : kMatchShares;
  const dim3 each(ceil_div(count, kMatchThreads)), grid(tiles, wanted < most ? wanted : most);
  cudaError_t error = VTOK_LAUNCH((match_clear_kernel<T>), each, dim3(kMatchThreads), 0, stream, args);
  if (error == cudaSuccess && segments > 0)
    error = VTOK_LAUNCH((match_tiles_kernel<T>), grid, dim3(kMatchThreads), 0, stream, args);
  if (error != cudaSuccess) return error;
  return VTOK_LAUNCH((match_finish_kernel<T>), each, dim3(kMatchThreads), 0, stream, args);
}

VTOK_HOST_EXPORT("bipartite_match_float32", match_launch<float>)
VTOK_HOST_EXPORT("bipartite_match_float16", match_launch<f16>)
VTOK_HOST_EXPORT("bipartite_match_bfloat16", match_launch<bf16>)
VTOK_HOST_EXPORT("bipartite_match_float64", match_launch<double>)

}  // namespace vtok
