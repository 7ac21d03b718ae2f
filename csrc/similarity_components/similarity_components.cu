#include "similarity_components/similarity_components.cuh"

#include "common/cuda.h"

namespace vtok {

void check_similarity_components(const Tensor& rows, const Tensor& cu_seqlens, double threshold,
                                 double eps);  // similarity_components.cpp

namespace {

Tensor similarity_components(const Tensor& rows, const Tensor& cu_seqlens, double threshold, double eps) {
  check_similarity_components(rows, cu_seqlens, threshold, eps);
  const int64_t count = rows.size(0);
  const CudaScope scope(rows);
  const Tensor source = dense_rows(rows), bounds = torch::stable::contiguous(cu_seqlens);
  Tensor label = empty(cu_seqlens, {count}, ScalarType::Long);
  if (count == 0) return label;
  dispatch_float(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_launch(
        "similarity_components",
        link_launch<T>(static_cast<const T*>(source.const_data_ptr()), count, source.stride(0), rows.size(1),
                       indices(bounds), bounds.size(0) - 1, threshold, eps, mutable_indices(label), scope.stream()));
  });
  return label;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("similarity_components", TORCH_BOX(&similarity_components)); }

}  // namespace vtok
