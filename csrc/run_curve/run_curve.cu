#include "run_curve/run_curve.cuh"

#include <optional>
#include <tuple>

#include "common/cuda.h"

namespace vtok {

void check_run_curve(const Tensor& tokens, const Tensor& cu_seqlens, const Tensor& tokens_per_frame, int64_t frames,
                     const std::optional<Tensor>& weights, int64_t extra_rows);  // run_curve.cpp

namespace {

// Bytes of shared memory that a block of the current device may ask for.
int64_t shared_limit() {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  check_launch("run_curve", error);
  return bytes;
}

std::tuple<Tensor, Tensor, Tensor> run_curve(const Tensor& tokens, const Tensor& cu_seqlens,
                                             const Tensor& tokens_per_frame, int64_t frames,
                                             const std::optional<Tensor>& weights, int64_t extra_rows) {
  check_run_curve(tokens, cu_seqlens, tokens_per_frame, frames, weights, extra_rows);
  const CudaScope scope(tokens);
  const int64_t rows = tokens.size(0), videos = cu_seqlens.size(0) - 1;
  const Tensor source = dense_rows(tokens), bounds = torch::stable::contiguous(cu_seqlens);
  const Tensor per_frame = torch::stable::contiguous(tokens_per_frame);
  const Tensor weighing = weights ? torch::stable::contiguous(*weights) : tokens;
  Tensor curve = empty(tokens, {rows}, ScalarType::Float), gain = empty(tokens, {rows}, ScalarType::Float);
  Tensor opens = empty(cu_seqlens, {rows * curve_words(frames)}, ScalarType::Long);
  if (rows == 0) return {curve, gain, opens};
  const int64_t limit = shared_limit();
  const CurveGrid grid = curve_grid(rows, videos, frames, limit);
  const Tensor workspace = empty(tokens, {grid.room * grid.room_blocks}, ScalarType::Byte);
  dispatch_float(tokens.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_launch("run_curve",
                 run_curve_launch<T>(static_cast<const T*>(source.const_data_ptr()), rows, source.stride(0),
                                     tokens.size(1), indices(bounds), indices(per_frame), videos, frames,
                                     weights ? static_cast<const float*>(weighing.const_data_ptr()) : nullptr,
                                     extra_rows, static_cast<float*>(curve.mutable_data_ptr()),
                                     static_cast<float*>(gain.mutable_data_ptr()), mutable_indices(opens),
                                     static_cast<char*>(workspace.mutable_data_ptr()), limit, scope.stream()));
  });
  return {curve, gain, opens};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("run_curve", TORCH_BOX(&run_curve)); }

}  // namespace vtok
