// From tensors to a gate: the same checks and outputs on every device.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>

#include "common/patch_check.h"
#include "motion_gate/motion_gate.h"

namespace vtok {

struct GateArgs {
  Tensor frames;
  std::vector<int64_t> patch;
  double threshold;
  int64_t tubelet;
  std::string metric, span, reference;
  int64_t refresh;
  bool pad;
  std::optional<Tensor> forced, state_frames, state_step;
};

struct GateTensors {
  std::vector<Tensor> inputs;  // alive as long as the gate
  Tensor keep, score, frames, step;
  MotionGate gate;
  std::tuple<Tensor, Tensor, Tensor, Tensor> outputs() const { return {keep, score, frames, step}; }
};

inline PatchVideo expect_gate(const GateArgs& args) {
  const char* op = "motion_gate";
  const Tensor& frames = args.frames;
  const PatchVideo video = expect_patches(op, frames, args.patch, args.tubelet, args.metric, args.span, args.pad);
  VTOK_EXPECT(std::isfinite(args.threshold) && args.threshold >= 0, op, "threshold finite and >= 0", args.threshold);
  VTOK_EXPECT(args.reference == "previous" || args.reference == "last_kept", op,
              "reference of \"previous\" or \"last_kept\"", text('"', args.reference, '"'));
  VTOK_EXPECT(args.refresh >= 0, op, "refresh >= 0", args.refresh);
  const int64_t B = video.videos, T = video.steps;
  if (args.forced) {
    const Tensor& forced = *args.forced;
    expect_dtype(op, "forced", forced, ScalarType::Bool);
    const bool some = (forced.dim() == 2 || forced.dim() == 4) && forced.size(0) == B && forced.size(1) == T;
    VTOK_EXPECT(some && (forced.dim() == 2 || (forced.size(2) == video.h && forced.size(3) == video.w)), op,
                text("forced of shape (B, T')=(", B, ", ", T, ") or (B, T', h, w)=(", B, ", ", T, ", ", video.h, ", ",
                     video.w, ")"),
                shape_text(forced));
    expect_same_device(op, "forced", forced, frames);
  }
  VTOK_EXPECT(args.state_frames.has_value() == args.state_step.has_value(), op, "state_frames and state_step together",
              "one of them");
  if (!args.state_frames) return video;
  const Tensor& state = *args.state_frames;
  expect_dtype(op, "state_frames", state, frames.scalar_type());
  VTOK_EXPECT(state.dim() == 5 && state.size(0) == B && state.size(1) == video.C && state.size(2) == video.tubelet &&
                  state.size(3) == video.H && state.size(4) == video.W,
              op,
              text("state_frames of shape (B, C, tubelet, H, W)=(", B, ", ", video.C, ", ", video.tubelet, ", ",
                   video.H, ", ", video.W, ")"),
              shape_text(state));
  expect_same_device(op, "state_frames", state, frames);
  expect_index(op, "state_step", *args.state_step, frames, "(B,)");
  VTOK_EXPECT(args.state_step->size(0) == B, op, text("state_step of shape (B,)=(", B, ",)"),
              shape_text(*args.state_step));
  return video;
}

inline PatchVideo state_video(const PatchVideo& video, const Tensor& state) {
  return state_video(video, state.const_data_ptr(), state.stride(0), state.stride(1), state.stride(2), state.stride(3));
}

inline GateTensors prepare_gate(const GateArgs& args) {
  const Tensor& frames = args.frames;
  PatchVideo video = expect_gate(args);
  const int64_t B = video.videos, T = video.steps;
  GateTensors out{{},
                  empty(frames, {B, T, video.h, video.w}, ScalarType::Bool),
                  empty(frames, {B, T, video.h, video.w}, score_type(frames)),
                  empty(frames, {B, video.C, video.tubelet, video.H, video.W}, frames.scalar_type()),
                  empty(frames, {B}, ScalarType::Long),
                  {}};
  const auto hold = [&](const Tensor& tensor) { return out.inputs.emplace_back(tensor); };
  set_pixels(video, hold(dense_pixels(frames)));
  MotionGate& gate = out.gate;
  gate.video = video;
  gate.threshold = args.threshold, gate.previous = args.reference == "previous", gate.refresh = args.refresh;
  if (args.forced) {
    gate.forced = static_cast<const bool*>(hold(torch::stable::contiguous(*args.forced)).const_data_ptr());
    gate.each_forced = args.forced->dim() == 4;
  }
  if (args.state_frames) {
    gate.given = state_video(video, hold(dense_pixels(*args.state_frames)));
    gate.given_step = indices(hold(torch::stable::contiguous(*args.state_step)));
  } else if (T == 0) {
    torch::stable::zero_(out.frames);  // a state that has seen nothing
  }
  gate.next = state_video(video, out.frames);
  gate.keep = static_cast<bool*>(out.keep.mutable_data_ptr());
  gate.score = out.score.mutable_data_ptr();
  gate.next_step = mutable_indices(out.step);
  return out;
}

}  // namespace vtok
