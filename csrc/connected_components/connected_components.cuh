// Three launches: every node its own label, every edge joined, every label followed to its root.
#pragma once

#include "common/union_find.cuh"

namespace vtok {

constexpr int kComponentsThreads = 256;

__global__ void __launch_bounds__(kComponentsThreads) components_clear_kernel(int64_t* label, int64_t n) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kComponentsThreads + threadIdx.x;
  if (s < n) label[s] = s;
}

__global__ void __launch_bounds__(kComponentsThreads)
    components_join_kernel(const int64_t* source, const int64_t* target, int64_t edges, int64_t n, int64_t* label) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kComponentsThreads + threadIdx.x;
  if (e >= edges) return;
  const int64_t a = source[e], b = target[e];
  if (a >= 0 && a < n && b >= 0 && b < n) join_roots(label, a, b);
}

__global__ void __launch_bounds__(kComponentsThreads) components_flatten_kernel(int64_t* label, int64_t n) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kComponentsThreads + threadIdx.x;
  if (s < n) flatten_label(label, s);
}

inline cudaError_t components_launch(const int64_t* source, const int64_t* target, int64_t edges, int64_t n,
                                     int64_t* label, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const dim3 block(kComponentsThreads), nodes(ceil_div(n, kComponentsThreads)), each(ceil_div(edges, block.x));
  cudaError_t error = VTOK_LAUNCH(components_clear_kernel, nodes, block, 0, stream, label, n);
  if (edges == 0 || error != cudaSuccess) return error;
  error = VTOK_LAUNCH(components_join_kernel, each, block, 0, stream, source, target, edges, n, label);
  if (error != cudaSuccess) return error;
  return VTOK_LAUNCH(components_flatten_kernel, nodes, block, 0, stream, label, n);
}

VTOK_HOST_EXPORT("connected_components", components_launch)

}  // namespace vtok
