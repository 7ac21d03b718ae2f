#include "topk/topk.cuh"

#include "common/cuda.h"

namespace vtok {

void check_topk(const Tensor& scores, const Tensor& cu_seqlens, const Tensor& cu_k, int64_t k);  // topk.cpp

namespace {

Tensor topk(const Tensor& scores, const Tensor& cu_seqlens, const Tensor& cu_k, int64_t k, bool largest) {
  check_topk(scores, cu_seqlens, cu_k, k);
  const int64_t rows = scores.size(0), segments = cu_k.size(0) - 1;
  VTOK_EXPECT(rows < int64_t{1} << 32, "topk", "fewer than 2^32 scores", rows);
  const CudaScope scope(scores);
  const Tensor values = torch::stable::contiguous(scores), starts = torch::stable::contiguous(cu_seqlens),
               slots = torch::stable::contiguous(cu_k);
  Tensor out = empty(cu_k, {k}, ScalarType::Long);
  if (k == 0) return out;
  int shared_bytes = 0;
  check_launch("topk", cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                              scores.get_device_index()));
  const TopkPlan plan = topk_plan(rows, segments, shared_bytes);
  const Tensor workspace =
      empty(scores, {topk_workspace_bytes(rows, segments, plan.shared_keys, plan.tile)}, ScalarType::Byte);
  check_launch("topk",
               topk_launch(static_cast<const float*>(values.const_data_ptr()), rows, indices(starts), indices(slots),
                           segments, k, largest, mutable_indices(out), workspace.mutable_data_ptr(), plan.shared_keys,
                           plan.tile, plan.threads, scope.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("topk", TORCH_BOX(&topk)); }

}  // namespace vtok
