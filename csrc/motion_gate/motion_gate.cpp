#include <algorithm>

#include "motion_gate/motion_gate_args.h"
#include "motion_gate/motion_gate_cpu.inc"

namespace vtok {
namespace {

constexpr int64_t kStripBytes = 96 * 1024;  // of a step of a strip: with its reference it stays in the cache

std::tuple<Tensor, Tensor, Tensor, Tensor> motion_gate(const Tensor& frames, std::vector<int64_t> patch,
                                                       double threshold, int64_t tubelet, const StringArg& metric,
                                                       const StringArg& span, const StringArg& reference,
                                                       int64_t refresh, bool pad, std::optional<Tensor> forced,
                                                       std::optional<Tensor> state_frames,
                                                       std::optional<Tensor> state_step) {
  const GateTensors tensors = prepare_gate(
      {frames, patch, threshold, tubelet, metric, span, reference, refresh, pad, forced, state_frames, state_step});
  const MotionGate& gate = tensors.gate;
  const PatchVideo& video = gate.video;
  const int64_t bytes = patch_values(video) * static_cast<int64_t>(frames.element_size());  // of a patch
  const int64_t most = std::clamp<int64_t>(kStripBytes / bytes, 1, std::min(video.w, kGatePatches));
  const int64_t strips = (video.w - 1) / most + 1, patches = (video.w - 1) / strips + 1;
  const MotionGateCpu& cpu = motion_gate_cpu();
  torch::stable::parallel_for(0, video.videos * video.h * strips, grain((video.steps + 1) * patches * bytes),
                              [&](int64_t begin, int64_t end) {
                                switch (frames.scalar_type()) {
                                  case ScalarType::Byte: return cpu.u8(gate, patches, begin, end);
                                  case ScalarType::Float: return cpu.f32(gate, patches, begin, end);
                                  case ScalarType::Half: return cpu.f16(gate, patches, begin, end);
                                  case ScalarType::BFloat16: return cpu.bf16(gate, patches, begin, end);
                                  default: return cpu.f64(gate, patches, begin, end);
                                }
                              });
  for (int64_t b = 0; b < video.videos; ++b) gate.next_step[b] = steps_seen(gate, b) + video.steps;
  return tensors.outputs();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_motion_gate); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("motion_gate", TORCH_BOX(&motion_gate)); }

}  // namespace vtok
