#include "bipartite_match/bipartite_match.cuh"

#include "common/cuda.h"

namespace vtok {

void check_bipartite_match(const Tensor& rows, const Tensor& cu_seqlens, int64_t split, int64_t guarded,
                           double eps);  // bipartite_match.cpp

namespace {

std::tuple<Tensor, Tensor> bipartite_match(const Tensor& rows, const Tensor& cu_seqlens, int64_t split, int64_t guarded,
                                           double eps) {
  check_bipartite_match(rows, cu_seqlens, split, guarded, eps);
  const int64_t count = rows.size(0);
  VTOK_EXPECT(count < int64_t{1} << 32, "bipartite_match", "fewer than 2^32 rows", count);
  const CudaScope scope(rows);
  const Tensor source = dense_rows(rows), bounds = torch::stable::contiguous(cu_seqlens);
  Tensor best = empty(rows, {count}, ScalarType::Float), target = empty(cu_seqlens, {count}, ScalarType::Long);
  if (count == 0) return {best, target};
  dispatch_float(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_launch("bipartite_match", match_launch<T>(static_cast<const T*>(source.const_data_ptr()), count,
                                                    source.stride(0), rows.size(1), indices(bounds), bounds.size(0) - 1,
                                                    split, guarded, eps, static_cast<float*>(best.mutable_data_ptr()),
                                                    mutable_indices(target), scope.stream()));
  });
  return {best, target};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("bipartite_match", TORCH_BOX(&bipartite_match)); }

}  // namespace vtok
