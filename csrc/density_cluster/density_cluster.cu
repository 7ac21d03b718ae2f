#include "density_cluster/density_cluster.cuh"

#include <optional>
#include <tuple>

#include "common/cuda.h"

namespace vtok {

void check_density_cluster(const Tensor& rows, const Tensor& cu_seqlens, const Tensor& cu_k, int64_t k,
                           int64_t neighbours, const std::optional<Tensor>& valid);  // density_cluster.cpp

namespace {

std::tuple<Tensor, Tensor, Tensor> density_cluster(const Tensor& rows, const Tensor& cu_seqlens, const Tensor& cu_k,
                                                   int64_t k, int64_t neighbours, const std::optional<Tensor>& valid) {
  check_density_cluster(rows, cu_seqlens, cu_k, k, neighbours, valid);
  const int64_t count = rows.size(0), groups = cu_k.size(0) - 1;
  VTOK_EXPECT(count < int64_t{1} << 32, "density_cluster", "fewer than 2^32 rows", count);
  const CudaScope scope(rows);
  const Tensor source = dense_rows(rows), bounds = torch::stable::contiguous(cu_seqlens),
               slots = torch::stable::contiguous(cu_k), mask = valid ? torch::stable::contiguous(*valid) : rows;
  Tensor assignment = empty(cu_seqlens, {count}, ScalarType::Long), centres = empty(cu_k, {k}, ScalarType::Long);
  Tensor score = empty(rows, {count}, ScalarType::Float);
  if (count == 0 && k == 0) return {assignment, centres, score};
  const Tensor workspace = empty(rows, {cluster_workspace_bytes(count, groups)}, ScalarType::Byte);
  dispatch_float(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_launch("density_cluster",
                 cluster_launch<T>(static_cast<const T*>(source.const_data_ptr()), count, source.stride(0),
                                   rows.size(1), indices(bounds), indices(slots), groups, k, neighbours,
                                   valid ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr,
                                   mutable_indices(assignment), mutable_indices(centres),
                                   static_cast<float*>(score.mutable_data_ptr()), workspace.mutable_data_ptr(),
                                   scope.stream()));
  });
  return {assignment, centres, score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("density_cluster", TORCH_BOX(&density_cluster)); }

}  // namespace vtok
