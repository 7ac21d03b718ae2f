#include "temporal_similarity/temporal_similarity.cuh"

#include "common/cuda.h"

namespace vtok {

void check_temporal_similarity(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame,
                               const std::string& metric, double eps);  // temporal_similarity.cpp

namespace {

Tensor temporal_similarity(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame,
                           const StringArg& metric, double eps) {
  check_temporal_similarity(tokens, cu_seqlens, tokens_per_frame, metric, eps);
  const CudaScope scope(tokens);
  const Tensor source = dense_rows(tokens), bounds = torch::stable::contiguous(cu_seqlens);
  const Tensor frames = torch::stable::contiguous(tokens_per_frame);
  const ScalarType type = tokens.scalar_type();
  Tensor scores = empty(tokens, {tokens.size(0)}, type == ScalarType::Double ? type : ScalarType::Float);
  if (tokens.size(0) == 0) return scores;
  dispatch_float(type, [&](auto zero) {
    using T = decltype(zero);
    check_launch("temporal_similarity",
                 similarity_launch<T>(static_cast<const T*>(source.const_data_ptr()), tokens.size(0), source.stride(0),
                                      tokens.size(1), indices(bounds), indices(frames), frames.size(0), metric == "l2",
                                      eps, static_cast<accumulator_t<T>*>(scores.mutable_data_ptr()), scope.stream()));
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("temporal_similarity", TORCH_BOX(&temporal_similarity)); }

}  // namespace vtok
