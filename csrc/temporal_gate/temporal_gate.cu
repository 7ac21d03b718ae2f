#include "temporal_gate/temporal_gate.cuh"

#include <optional>
#include <tuple>

#include "common/cuda.h"

namespace vtok {

void check_temporal_gate(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame, int64_t sites,
                         double threshold, const std::string& reference, const std::string& metric, double eps,
                         int64_t refresh, const std::optional<Tensor>& state_rows,
                         const std::optional<Tensor>& state_weight,
                         const std::optional<Tensor>& state_step);  // temporal_gate.cpp

namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs temporal_gate(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame, int64_t sites,
                      double threshold, const StringArg& reference, const StringArg& metric, double eps,
                      int64_t refresh, const std::optional<Tensor>& state_rows,
                      const std::optional<Tensor>& state_weight, const std::optional<Tensor>& state_step) {
  check_temporal_gate(tokens, cu_seqlens, tokens_per_frame, sites, threshold, reference, metric, eps, refresh,
                      state_rows, state_weight, state_step);
  const CudaScope scope(tokens);
  const int64_t rows = tokens.size(0), D = tokens.size(1), videos = cu_seqlens.size(0) - 1;
  const Tensor source = dense_rows(tokens), bounds = torch::stable::contiguous(cu_seqlens);
  const Tensor frames = torch::stable::contiguous(tokens_per_frame);
  const Tensor old_rows = state_rows ? torch::stable::contiguous(*state_rows) : tokens;
  const Tensor old_weight = state_weight ? torch::stable::contiguous(*state_weight) : tokens;
  const Tensor old_step = state_step ? torch::stable::contiguous(*state_step) : cu_seqlens;
  const ScalarType wide = tokens.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor keep = empty(tokens, {rows}, ScalarType::Bool), similarity = empty(tokens, {rows}, wide);
  Tensor next_rows = empty(tokens, {sites, D}, wide), next_weight = empty(tokens, {sites}, ScalarType::Float);
  Tensor next_step = empty(cu_seqlens, {videos}, ScalarType::Long);
  const Tensor workspace = empty(cu_seqlens, {videos + 1}, ScalarType::Long);
  dispatch_float(tokens.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator_t<T>;
    check_launch(
        "temporal_gate",
        temporal_gate_launch<T>(
            static_cast<const T*>(source.const_data_ptr()), rows, source.stride(0), D, indices(bounds), indices(frames),
            videos, sites, threshold, reference == "previous", reference == "run_mean", metric == "l2", eps, refresh,
            state_rows ? static_cast<const A*>(old_rows.const_data_ptr()) : nullptr,
            state_weight ? static_cast<const float*>(old_weight.const_data_ptr()) : nullptr,
            state_step ? indices(old_step) : nullptr, static_cast<uint8_t*>(keep.mutable_data_ptr()),
            static_cast<A*>(similarity.mutable_data_ptr()), static_cast<A*>(next_rows.mutable_data_ptr()),
            static_cast<float*>(next_weight.mutable_data_ptr()), mutable_indices(next_step), mutable_indices(workspace),
            scope.stream()));
  });
  return {keep, similarity, next_rows, next_weight, next_step};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("temporal_gate", TORCH_BOX(&temporal_gate)); }

}  // namespace vtok
