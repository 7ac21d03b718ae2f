#include "group/group.cuh"

#include <tuple>

#include "common/cuda.h"

namespace vtok {

void check_group(const Tensor& assignment, int64_t k);  // group.cpp

namespace {

std::tuple<Tensor, Tensor> group(const Tensor& assignment, int64_t k) {
  check_group(assignment, k);
  const CudaScope scope(assignment);
  const int64_t rows = assignment.size(0);
  const GroupPlan plan = group_plan(rows, k);
  const Tensor groups = torch::stable::contiguous(assignment);
  Tensor members = empty(assignment, {rows}, ScalarType::Long), offsets = empty(assignment, {k + 1}, ScalarType::Long);
  Tensor scratch = empty(assignment, {plan.passes > 1 ? rows : 0}, ScalarType::Long);
  Tensor workspace = empty(assignment, {plan.words}, ScalarType::Long);
  torch::stable::zero_(workspace);
  check_launch("group", group_launch(indices(groups), rows, k, mutable_indices(members), mutable_indices(offsets),
                                     mutable_indices(scratch), mutable_indices(workspace), scope.stream()));
  return {members, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("group", TORCH_BOX(&group)); }

}  // namespace vtok
