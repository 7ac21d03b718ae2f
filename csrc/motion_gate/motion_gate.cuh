// Each patch against the pixels at which it was last kept. A block walks a strip of patches through all steps; its
// references lie in the state that is returned, where each thread reads and writes columns of its own, and come from
// the cache. So every pixel comes from memory once.
#pragma once

#include "common/patch.cuh"
#include "motion_gate/motion_gate.h"

namespace vtok {

// Frames [first, last) of a thread's column of words.
template <class T, class Word>
VTOK_DEVICE void copy_column(const PatchVideo& video, const PatchStrip& strip, const PatchPixels<T>& source,
                             const PatchPixels<T>& target, int64_t first, int64_t last, int64_t column) {
  for (int64_t channel = 0; channel < video.C; ++channel)
    for (int64_t frame = first; frame < last; ++frame) {
      const T* from = source.at + channel * source.channel + frame * source.frame + column;
      T* to = const_cast<T*>(target.at) + channel * target.channel + frame * target.frame + column;
#pragma unroll 1
      for (int y = 0, rows = static_cast<int>(strip.rows); y < rows; y += kPatchBatch, to += kPatchBatch * target.row) {
        Word words[kPatchBatch];
        load_rows(from, source.row, rows - y, words);
        store_rows(to, target.row, rows - y, words);
      }
    }
}

template <class T, class Word, PatchKind kKind>
__global__ void __launch_bounds__(kPatchThreads, 3) motion_gate_kernel(MotionGate gate, int64_t patches) {
  using A = accumulator_t<T>;
  using Shared = PatchShared<T, Word, kKind>;
  using Kept = bool[kPatchThreads];
  VTOK_SHARED(Shared, shared);
  VTOK_SHARED(Kept, kept);
  const PatchVideo& video = gate.video;
  const int64_t strips = (video.w - 1) / patches + 1, row = blockIdx.x / strips, px = blockIdx.x % strips * patches;
  const int64_t b = row / video.h, py = row % video.h, left = video.w - px, compared = compared_frames(video);
  const PatchStrip strip = patch_strip(video, py, px, left < patches ? left : patches);
  const PatchPixels<T> next = pixels_of<T>(gate.next, b, 0, py, px);
  const int64_t seen = steps_seen(gate, b), cells = video.h * video.w;
  const int thread = threadIdx.x;
  // The block's columns of pixels are those of one round, or of several where a patch is wider.
  constexpr int64_t kRound = kPatchThreads * kWordPixels<T, Word>;
  const int64_t width = strip.patches * video.pw < strip.columns ? strip.patches * video.pw : strip.columns;
  const int64_t first = thread * kWordPixels<T, Word>;
  const int64_t patch = strip.patches > 1 ? first / video.pw : 0;  // of the thread's columns
  const auto copy = [&](const PatchPixels<T>& source, int64_t begin, int64_t end) {
    for (int64_t column = first; column < width; column += kRound)
      copy_column<T, Word>(video, strip, source, next, begin, end, column);
  };

  if (gate.given.frames && (seen > 0 || video.steps == 0))
    copy(pixels_of<T>(gate.given, b, 0, py, px), 0, video.tubelet);
  int64_t last = -1;  // the step that the reference is of
  int buffer = 0;
  for (int64_t t = 0; t < video.steps; ++t) {
    const bool all = whole_step(gate, b, t, seen), opens = seen + t == 0;
    A score = static_cast<A>(INFINITY);
    if (!opens)
      score =
          score_strip<T, Word, kKind>(video, strip, step_pixels<T>(video, b, t, py, px), next, false, shared, buffer);
    if (thread < strip.patches) {
      const int64_t place = (b * video.steps + t) * cells + py * video.w + px + thread;
      const bool keep = all || score > static_cast<A>(gate.threshold) || (gate.each_forced && gate.forced[place]);
      kept[thread] = gate.keep[place] = keep;
      static_cast<A*>(gate.score)[place] = score;
    }
    __syncthreads();
    if (first < width && (gate.previous || kept[patch])) {
      last = t;
      copy(reference_pixels<T>(video, b, t, py, px), 0, compared);
    }
  }
  if (last >= 0 && compared < video.tubelet) copy(reference_pixels<T>(video, b, last, py, px), compared, video.tubelet);
  if (thread == 0 && py == 0 && px == 0) gate.next_step[b] = seen + video.steps;
}

template <class T>
cudaError_t motion_gate_launch(const MotionGate& gate, cudaStream_t stream) {
  if (gate.video.videos == 0) return cudaSuccess;
  // The widest word must fit the frames and the states.
  PatchVideo fits = gate.video;
  for (const PatchVideo& state : {gate.given, gate.next}) {
    fits.batch |= state.batch, fits.frame |= state.frame, fits.channel |= state.channel, fits.row |= state.row;
    fits.frames = reinterpret_cast<const void*>(reinterpret_cast<uint64_t>(fits.frames) |
                                                reinterpret_cast<uint64_t>(state.frames));
  }
  return dispatch_patches<T>(fits, [&](auto word, auto kind) {
    using Word = decltype(word);
    const int64_t patches = strip_patches<T, Word>(gate.video), strips = ceil_div(gate.video.w, patches);
    return VTOK_LAUNCH((motion_gate_kernel<T, Word, decltype(kind)::value>),
                       dim3(strips * gate.video.h * gate.video.videos), dim3(kPatchThreads), 0, stream, gate, patches);
  });
}

// The same from pointers and numbers; the states lie in one piece.
template <class T>
cudaError_t motion_gate_call(const T* frames, int64_t batch, int64_t frame, int64_t channel, int64_t row,
                             int64_t videos, int64_t steps, int64_t C, int64_t H, int64_t W, int64_t tubelet,
                             int64_t ph, int64_t pw, bool whole, int metric, double threshold, bool previous,
                             int64_t refresh, const bool* forced, bool each_forced, const T* given,
                             const int64_t* given_step, bool* keep, accumulator_t<T>* score, T* next,
                             int64_t* next_step, cudaStream_t stream) {
  const PatchVideo video{frames,
                         batch,
                         frame,
                         channel,
                         row,
                         videos,
                         steps,
                         C,
                         H,
                         W,
                         tubelet,
                         ph,
                         pw,
                         ceil_div(H, ph),
                         ceil_div(W, pw),
                         whole,
                         static_cast<PatchMetric>(metric)};
  const auto state = [&](const T* at) {
    return state_video(video, at, C * tubelet * H * W, tubelet * H * W, H * W, W);
  };
  return motion_gate_launch<T>({video, threshold, previous, refresh, forced, each_forced, state(given), state(next),
                                given_step, keep, score, next_step},
                               stream);
}

VTOK_HOST_EXPORT("motion_gate_uint8", motion_gate_call<uint8_t>)
VTOK_HOST_EXPORT("motion_gate_float32", motion_gate_call<float>)
VTOK_HOST_EXPORT("motion_gate_float16", motion_gate_call<f16>)
VTOK_HOST_EXPORT("motion_gate_bfloat16", motion_gate_call<bf16>)
VTOK_HOST_EXPORT("motion_gate_float64", motion_gate_call<double>)

}  // namespace vtok
