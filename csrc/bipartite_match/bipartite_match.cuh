// A block multiplies a tile of sources with tiles of destinations, some columns of both in shared memory at a time, and
// each thread keeps the best of its pairs. The tiles of destinations are shared out among several blocks, whose bests
// meet in an atomic maximum of integer keys, so that their order changes nothing.
#pragma once

#include "bipartite_match/bipartite_match.h"
#include "common/canonical.cuh"

namespace vtok {

constexpr int kMatchTile = 64, kMatchDepth = 32;                      // rows and columns of a tile
constexpr int kMatchSide = 16, kMatchEach = kMatchTile / kMatchSide;  // threads along a side, rows of each
constexpr int kMatchThreads = kMatchSide * kMatchSide;
constexpr int kMatchPitch = kMatchDepth + 4;  // 16-byte reads of 8 neighbouring rows meet no bank twice
constexpr int kMatchLoads = kMatchTile * kMatchDepth / kMatchThreads;
constexpr int kMatchBlocks = 1024, kMatchShares = 32;  // blocks to aim at, and in how many the destinations go at most

template <class T>
struct MatchArgs {
  const T* rows;  // [count, D], rows `stride` values apart
  int64_t count, stride, D;
  const int64_t* cu_seqlens;  // [segments + 1]: any values, none leads outside a tensor
  int64_t segments;
  MatchRule rule;
  float eps;
  float* best;      // [count]
  int64_t* target;  // [count], keys at first: a cosine in order above, the row's complement below; 0 is none
  int64_t span;     // rows of a segment that hold at most kMatchTile sources
};

struct alignas(16) Four {
  float x[4];
};

struct alignas(16) MatchShared {
  float tiles[2 * kMatchTile * kMatchPitch];  // rows of sources, then of destinations
  int64_t rows[2 * kMatchTile];               // where they lie, -1 beyond the last
  float norms[2 * kMatchTile];                // squared
};

VTOK_DEVICE float to_float(double x) { return static_cast<float>(x); }
template <class T>
VTOK_DEVICE float to_float(T x) {
  return widen(x);
}

template <class T>
VTOK_DEVICE int64_t match_begin(const MatchArgs<T>& args, int64_t v) {
  const int64_t begin = args.cu_seqlens[v];
  return begin < 0 ? 0 : begin < args.count ? begin : args.count;
}

// The number of a segment's first tile: every segment before it leaves room for one that is not full.
template <class T>
VTOK_DEVICE int64_t first_match_tile(const MatchArgs<T>& args, int64_t v) {
  return match_begin(args, v) / args.span + v;
}

template <class T>
VTOK_DEVICE int64_t segment_of_tile(const MatchArgs<T>& args, int64_t tile) {
  int64_t low = 0, high = args.segments;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_match_tile(args, middle) <= tile) low = middle;
    else high = middle;
  }
  return low;
}

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

// What a thread carries from global memory to the tiles: half of it of sources, half of destinations.
struct MatchCargo {
  float x[2 * kMatchLoads];
};

template <class T>
VTOK_DEVICE void fetch_tiles(const MatchArgs<T>& args, const MatchShared& shared, int64_t column, MatchCargo& cargo) {
  const int64_t at = column + threadIdx.x % kMatchDepth;
#pragma unroll
  for (int i = 0; i < 2 * kMatchLoads; ++i) {
    const int64_t row = shared.rows[threadIdx.x / kMatchDepth + i * (kMatchThreads / kMatchDepth)];
    cargo.x[i] = row >= 0 && at < args.D ? to_float(args.rows[row * args.stride + at]) : 0.0f;
  }
}

VTOK_DEVICE void store_tiles(const MatchCargo& cargo, MatchShared& shared) {
  float* const to = shared.tiles + threadIdx.x / kMatchDepth * kMatchPitch + threadIdx.x % kMatchDepth;
#pragma unroll
  for (int i = 0; i < 2 * kMatchLoads; ++i) to[i * (kMatchThreads / kMatchDepth) * kMatchPitch] = cargo.x[i];
}

VTOK_DEVICE Four read_four(const float* from) { return *reinterpret_cast<const Four*>(from); }

// Adds the columns in shared memory to a thread's dot products, ascending.
VTOK_DEVICE void multiply_tiles(const MatchShared& shared, int x, int y, float (&dots)[kMatchEach][kMatchEach]) {
#pragma unroll 2
  for (int k = 0; k < kMatchDepth; k += 4) {
    Four a[kMatchEach];
#pragma unroll
    for (int i = 0; i < kMatchEach; ++i) a[i] = read_four(shared.tiles + (y + i * kMatchSide) * kMatchPitch + k);
#pragma unroll
    for (int j = 0; j < kMatchEach; ++j) {
      const Four b = read_four(shared.tiles + (kMatchTile + x + j * kMatchSide) * kMatchPitch + k);
#pragma unroll
      for (int i = 0; i < kMatchEach; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) dots[i][j] = fmaf(a[i].x[c], b.x[c], dots[i][j]);
    }
  }
}

// The same for the squared norm of one row of the tiles, in the same order: identical rows have a cosine of exactly 1.
VTOK_DEVICE float add_norm(const float* row, float norm) {
#pragma unroll 2
  for (int k = 0; k < kMatchDepth; k += 4) {
    const Four x = read_four(row + k);
#pragma unroll
    for (int c = 0; c < 4; ++c) norm = fmaf(x.x[c], x.x[c], norm);
  }
  return norm;
}

template <class T>
__global__ void __launch_bounds__(kMatchThreads) match_clear_kernel(MatchArgs<T> args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMatchThreads + threadIdx.x;
  if (row < args.count) args.target[row] = 0;
}

template <class T>
__global__ void __launch_bounds__(kMatchThreads) match_tiles_kernel(MatchArgs<T> args) {
  VTOK_SHARED(MatchShared, shared);
  const int thread = threadIdx.x, x = thread % kMatchSide, y = thread / kMatchSide;
  const int64_t v = segment_of_tile(args, blockIdx.x), begin = match_begin(args, v);
  const int64_t end = match_begin(args, v + 1), rows = end > begin ? end - begin : 0;
  const int64_t guarded = args.rule.guarded < rows ? args.rule.guarded : rows;
  const int64_t source =
      sources_in(args.rule, guarded) + (static_cast<int64_t>(blockIdx.x) - first_match_tile(args, v)) * kMatchTile;
  const int64_t sources = sources_in(args.rule, rows) - source, destinations = destinations_in(args.rule, rows);
  if (sources <= 0) return;

  float best[kMatchEach];
  int64_t at[kMatchEach];
#pragma unroll
  for (int i = 0; i < kMatchEach; ++i) at[i] = -1;
  int64_t first = destinations_in(args.rule, guarded) + static_cast<int64_t>(blockIdx.y) * kMatchTile;
  for (; first < destinations; first += static_cast<int64_t>(gridDim.y) * kMatchTile) {
    if (thread < kMatchTile)
      shared.rows[thread] = thread < sources ? begin + source_row(args.rule, source + thread) : -1;
    else if (const int64_t number = first + thread - kMatchTile; thread < 2 * kMatchTile)
      shared.rows[thread] = number < destinations ? begin + destination_row(args.rule, number) : -1;
    __syncthreads();
    MatchCargo cargo;
    float dots[kMatchEach][kMatchEach] = {}, norm = 0;
    fetch_tiles(args, shared, 0, cargo);
    for (int64_t column = 0; column < args.D; column += kMatchDepth) {
      store_tiles(cargo, shared);
      __syncthreads();
      fetch_tiles(args, shared, column + kMatchDepth, cargo);
      if (thread < 2 * kMatchTile) norm = add_norm(shared.tiles + thread * kMatchPitch, norm);
      multiply_tiles(shared, x, y, dots);
      __syncthreads();
    }
    if (thread < 2 * kMatchTile) shared.norms[thread] = norm;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMatchEach; ++i) {
#pragma unroll
      for (int j = 0; j < kMatchEach; ++j) {
        const int other = kMatchTile + x + j * kMatchSide;
        const int64_t row = shared.rows[other];
        if (row < 0) continue;
        const float cosine =
            canonical_cosine(dots[i][j], shared.norms[y + i * kMatchSide], shared.norms[other], args.eps);
        if (at[i] < 0 || (cosine == cosine && !(cosine <= best[i]))) best[i] = cosine, at[i] = row;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kMatchEach; ++i) {
    unsigned long long key = at[i] < 0 ? 0 : match_key(best[i], at[i]);
#pragma unroll
    for (int by = kMatchSide / 2; by; by /= 2) {
      const unsigned long long other = __shfl_xor_sync(kFullMask, key, by);
      key = other > key ? other : key;
    }
    const int64_t number = y + i * kMatchSide;
    if (x == 0 && key && number < sources)
      atomicMax(reinterpret_cast<unsigned long long*>(args.target) + begin + source_row(args.rule, source + number),
                key);
  }
}

template <class T>
__global__ void __launch_bounds__(kMatchThreads) match_finish_kernel(MatchArgs<T> args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMatchThreads + threadIdx.x;
  if (row >= args.count) return;
  bool looks = false;
  if (args.segments > 0) {
    const int64_t v = find_video(args.cu_seqlens, args.segments, row), i = row - match_begin(args, v);
    looks = i >= args.rule.guarded && row < match_begin(args, v + 1) && i % args.rule.split != args.rule.split - 1;
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
  const int64_t span = kMatchTile + kMatchTile / (split - 1), tiles = count / span + segments;
  const MatchArgs<T> args{
      rows, count,  stride, D, cu_seqlens, segments, MatchRule{split, guarded}, static_cast<float>(eps),
      best, target, span};
  const int64_t wanted = ceil_div(kMatchBlocks, tiles + 1), useful = ceil_div(count, kMatchTile) / 2 + 1;
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
