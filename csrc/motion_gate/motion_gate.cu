#include "motion_gate/motion_gate.cuh"

#include "common/cuda.h"
#include "motion_gate/motion_gate_args.h"

namespace vtok {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> motion_gate(const Tensor& frames, std::vector<int64_t> patch,
                                                       double threshold, int64_t tubelet, const StringArg& metric,
                                                       const StringArg& span, const StringArg& reference,
                                                       int64_t refresh, bool pad, std::optional<Tensor> forced,
                                                       std::optional<Tensor> state_frames,
                                                       std::optional<Tensor> state_step) {
  const GateArgs args{frames,    patch,   threshold, tubelet, metric,       span,
                      reference, refresh, pad,       forced,  state_frames, state_step};
  expect_gate(args);
  const CudaScope scope(frames);
  const GateTensors tensors = prepare_gate(args);
  dispatch_pixels(frames.scalar_type(), [&](auto zero) {
    check_launch("motion_gate", motion_gate_launch<decltype(zero)>(tensors.gate, scope.stream()));
  });
  return tensors.outputs();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("motion_gate", TORCH_BOX(&motion_gate)); }

}  // namespace vtok
