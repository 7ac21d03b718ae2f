#include "compact/compact.cuh"

#include <tuple>

#include "common/cuda.h"

namespace vtok {

void check_compact(const Tensor& keep, const Tensor& cu_seqlens, int64_t capacity);  // compact.cpp

namespace {

std::tuple<Tensor, Tensor> compact(const Tensor& keep, const Tensor& cu_seqlens, int64_t capacity) {
  check_compact(keep, cu_seqlens, capacity);
  const CudaScope scope(keep);
  const int64_t rows = keep.size(0), videos = cu_seqlens.size(0) - 1;
  const Tensor mask = torch::stable::contiguous(keep), bounds = torch::stable::contiguous(cu_seqlens);
  Tensor index = empty(cu_seqlens, {capacity}, ScalarType::Long);
  Tensor counts = empty(cu_seqlens, {videos}, ScalarType::Long);
  Tensor workspace = empty(cu_seqlens, {compact_workspace(rows, capacity)}, ScalarType::Long);
  check_launch("compact", compact_launch(static_cast<const uint8_t*>(mask.const_data_ptr()), rows, indices(bounds),
                                         videos, mutable_indices(index), capacity, mutable_indices(counts),
                                         mutable_indices(workspace), scope.stream()));
  return {index, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("compact", TORCH_BOX(&compact)); }

}  // namespace vtok
