#include "merge/merge.cuh"

#include <optional>
#include <tuple>

#include "common/cuda.h"

namespace vtok {

void check_merge(const Tensor& tokens, const Tensor& members, const Tensor& offsets,
                 const std::optional<Tensor>& weights, const std::string& reduce);  // merge.cpp
ScalarType merge_accumulator(const Tensor& tokens);

namespace {

std::tuple<Tensor, Tensor> merge(const Tensor& tokens, const Tensor& members, const Tensor& offsets,
                                 const std::optional<Tensor>& weights, const StringArg& reduce) {
  check_merge(tokens, members, offsets, weights, reduce);
  const CudaScope scope(tokens);
  const int64_t groups = offsets.size(0) - 1;
  const Tensor source = dense_rows(tokens), list = torch::stable::contiguous(members);
  const Tensor bounds = torch::stable::contiguous(offsets);
  const Tensor sizes = weights ? torch::stable::contiguous(*weights) : tokens;
  Tensor values = empty(tokens, {groups, tokens.size(1)}, tokens.scalar_type());
  Tensor weight = empty(tokens, {groups}, merge_accumulator(tokens));
  if (groups == 0) return {values, weight};
  dispatch_float(tokens.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator_t<T>;
    const A* given = weights ? static_cast<const A*>(sizes.const_data_ptr()) : nullptr;
    check_launch("merge",
                 merge_launch<T>(static_cast<const T*>(source.const_data_ptr()), tokens.size(0), source.stride(0),
                                 tokens.size(1), indices(list), members.size(0), indices(bounds), groups, given,
                                 reduce == "mean", reduce == "max", static_cast<T*>(values.mutable_data_ptr()),
                                 static_cast<A*>(weight.mutable_data_ptr()), scope.stream()));
  });
  return {values, weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("merge", TORCH_BOX(&merge)); }

}  // namespace vtok
