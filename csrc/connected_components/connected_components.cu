#include "connected_components/connected_components.cuh"

#include "common/cuda.h"

namespace vtok {

void check_connected_components(const Tensor& source, const Tensor& target, int64_t n);  // connected_components.cpp

namespace {

Tensor connected_components(const Tensor& source, const Tensor& target, int64_t n) {
  check_connected_components(source, target, n);
  const CudaScope scope(source);
  const Tensor from = torch::stable::contiguous(source), to = torch::stable::contiguous(target);
  Tensor label = empty(source, {n}, ScalarType::Long);
  check_launch("connected_components", components_launch(indices(from), indices(to), source.size(0), n,
                                                         mutable_indices(label), scope.stream()));
  return label;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("connected_components", TORCH_BOX(&connected_components)); }

}  // namespace vtok
