// A block multiplies a tile of rows with the tiles after it in its group and joins the pairs above the threshold, in a
// union-find that all blocks share. Three launches: every row its own label, the tiles, every label followed to its
// root.
#pragma once

#include "common/dot_tiles.cuh"
#include "common/union_find.cuh"

namespace vtok {

constexpr int kLinkThreads = kDotThreads;
constexpr int kLinkBlocks = 1024, kLinkShares = 32;  // blocks to aim at, and how many share the tiles that one meets

template <class T>
struct LinkArgs {
  DotRows<T> of;
  float threshold, eps;
  int64_t* label;  // [count]
};

struct LinkShared {
  DotShared tiles;
  int64_t roots[2 * kDotTile];  // of their rows, as of before they met
};

template <class T>
__global__ void __launch_bounds__(kLinkThreads) link_clear_kernel(LinkArgs<T> args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLinkThreads + threadIdx.x;
  if (row < args.of.count) args.label[row] = row;
}

// Two blocks at once, or some compilers spill to fit a third.
template <class T>
__global__ void __launch_bounds__(kLinkThreads, 2) link_tiles_kernel(LinkArgs<T> args) {
  VTOK_SHARED(LinkShared, shared);
  const int thread = threadIdx.x, x = thread % kDotSide, y = thread / kDotSide;
  const int64_t v = segment_of_tile(args.of, blockIdx.x), begin = segment_begin(args.of, v);
  const int64_t rows = segment_begin(args.of, v + 1) - begin, own = blockIdx.x - first_tile(args.of, v);
  if (own * kDotTile >= rows) return;
  for (int64_t other = own + blockIdx.y; other * kDotTile < rows; other += gridDim.y) {
    if (thread < 2 * kDotTile) {
      const int64_t number = (thread < kDotTile ? own : other) * kDotTile + thread % kDotTile;
      shared.tiles.rows[thread] = number < rows ? begin + number : -1;
    }
    __syncthreads();
    float dots[kDotEach][kDotEach] = {};
    multiply_rows(args.of, shared.tiles, x, y, dots);
    if (thread < 2 * kDotTile) {
      const int64_t row = shared.tiles.rows[thread];
      shared.roots[thread] = row < 0 ? -1 : find_root(args.label, row);
    }
    __syncthreads();
    unsigned linked = 0;
#pragma unroll
    for (int i = 0; i < kDotEach; ++i) {
#pragma unroll
      for (int j = 0; j < kDotEach; ++j) {
        const int a = y + i * kDotSide, b = kDotTile + x + j * kDotSide;
        if (shared.roots[a] == shared.roots[b]) continue;  // joined before
        const float cosine = canonical_cosine(dots[i][j], shared.tiles.norms[a], shared.tiles.norms[b], args.eps);
        linked |= cosine > args.threshold ? 1u << (i * kDotEach + j) : 0u;
      }
    }
    for (; linked; linked &= linked - 1) {
      const int pair = __ffs(static_cast<int>(linked)) - 1;
      const int64_t a = shared.roots[y + pair / kDotEach * kDotSide];
      const int64_t b = shared.roots[kDotTile + x + pair % kDotEach * kDotSide];
      if (a >= 0 && b >= 0) join_roots(args.label, a, b);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kLinkThreads) link_flatten_kernel(LinkArgs<T> args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLinkThreads + threadIdx.x;
  if (row >= args.of.count) return;
  if (row < segment_begin(args.of, args.of.segments)) flatten_label(args.label, row);
  else args.label[row] = -1;
}

// count > 0. The grid follows from sizes alone: the host knows no boundaries.
template <class T>
cudaError_t link_launch(const T* rows, int64_t count, int64_t stride, int64_t D, const int64_t* cu_seqlens,
                        int64_t segments, double threshold, double eps, int64_t* label, cudaStream_t stream) {
  const LinkArgs<T> args{{rows, count, stride, D, cu_seqlens, segments, kDotTile},
                         static_cast<float>(threshold),
                         static_cast<float>(eps),
                         label};
  const int64_t tiles = count / kDotTile + segments, wanted = ceil_div(kLinkBlocks, tiles + 1);
  const dim3 block(kLinkThreads), each(ceil_div(count, kLinkThreads));
  const dim3 grid(tiles, wanted < kLinkShares ? wanted : kLinkShares);
  cudaError_t error = VTOK_LAUNCH((link_clear_kernel<T>), each, block, 0, stream, args);
  if (error == cudaSuccess && segments > 0) error = VTOK_LAUNCH((link_tiles_kernel<T>), grid, block, 0, stream, args);
  if (error != cudaSuccess) return error;
  return VTOK_LAUNCH((link_flatten_kernel<T>), each, block, 0, stream, args);
}

VTOK_HOST_EXPORT("similarity_components_float32", link_launch<float>)
VTOK_HOST_EXPORT("similarity_components_float16", link_launch<f16>)
VTOK_HOST_EXPORT("similarity_components_bfloat16", link_launch<bf16>)
VTOK_HOST_EXPORT("similarity_components_float64", link_launch<double>)

}  // namespace vtok
