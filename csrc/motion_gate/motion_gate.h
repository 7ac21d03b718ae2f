// What a gate works on, as the CPU and CUDA share it.
#pragma once

#include "common/patch.h"

namespace vtok {

struct MotionGate {
  PatchVideo video;
  double threshold;
  bool previous;  // every patch becomes the next step's reference; else those that are kept
  int64_t refresh;
  const bool* forced;  // [videos, steps] or, where each_forced, [videos, steps, h, w]; or null
  bool each_forced;
  PatchVideo given, next;     // the states, as videos of one step; given.frames may be null
  const int64_t* given_step;  // [videos] or null
  bool* keep;                 // [videos, steps, h, w]
  void* score;                // likewise, of float32, or of float64 for float64 pixels
  int64_t* next_step;         // [videos]
};

VTOK_BOTH int64_t steps_seen(const MotionGate& gate, int64_t b) {
  return gate.given_step && gate.given_step[b] > 0 ? gate.given_step[b] : 0;
}

// Whether step t of video b is kept entirely; `seen` steps came before the first.
VTOK_BOTH bool whole_step(const MotionGate& gate, int64_t b, int64_t t, int64_t seen) {
  return seen + t == 0 || (gate.refresh > 0 && (seen + t) % gate.refresh == 0) ||
         (gate.forced && !gate.each_forced && gate.forced[b * gate.video.steps + t]);
}

// A state [videos, C, tubelet, H, W] with these strides, its frames as those of one step.
VTOK_BOTH PatchVideo state_video(const PatchVideo& video, const void* frames, int64_t batch, int64_t channel,
                                 int64_t frame, int64_t row) {
  PatchVideo state = video;
  state.frames = frames, state.batch = batch, state.frame = frame, state.channel = channel, state.row = row;
  return state;
}

}  // namespace vtok
