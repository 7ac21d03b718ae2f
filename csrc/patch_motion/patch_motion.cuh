// Each patch against the same one a step earlier. A block walks a strip of patches through a run of steps and keeps
// the pixels of the step before in shared memory where they fit, each thread its own. So every pixel comes from memory
// once, and once more where a run begins.
#pragma once

#include "common/patch.cuh"

namespace vtok {

constexpr int64_t kMotionMinRun = 8, kMotionMaxRun = 64;  // steps of a run
constexpr int64_t kMotionBlocks = 4096;                   // that fill the largest device
constexpr int64_t kMotionStage = 48 * 1024;               // bytes of a step that shared memory keeps

template <class T, class Word, PatchKind kKind>
__global__ void __launch_bounds__(kPatchThreads, 3)
    motion_kernel(PatchVideo video, int64_t patches, int64_t run, bool staged, accumulator_t<T>* scores) {
  using Shared = PatchShared<T, Word, kKind>;
  VTOK_SHARED(Shared, shared);
  VTOK_DYNAMIC_SHARED(stage);
  const int64_t strips = (video.w - 1) / patches + 1;
  int64_t block = blockIdx.x;
  const int64_t px = block % strips * patches, py = (block /= strips) % video.h, b = (block /= video.h) % video.videos;
  const int64_t begin = block / video.videos * run, left = video.w - px;
  const int64_t end = begin + run < video.steps ? begin + run : video.steps;
  const PatchStrip strip = patch_strip(video, py, px, left < patches ? left : patches);
  accumulator_t<T>* to = scores + ((b * video.steps + begin) * video.h + py) * video.w + px + threadIdx.x;
  T* const kept = staged ? reinterpret_cast<T*>(stage) : nullptr;
  constexpr int64_t kRow = kPatchThreads * kWordPixels<T, Word>;
  const PatchPixels<T> before{kept, video.ph * kRow, compared_frames(video) * video.ph * kRow, kRow};
  int buffer = 0;
  if (begin == 0 && threadIdx.x < strip.patches) *to = static_cast<accumulator_t<T>>(INFINITY);
  if (begin == 0) to += video.h * video.w;
  const int64_t first = begin > 0 ? begin : 1, column = threadIdx.x * kWordPixels<T, Word>;
  if (staged && column < strip.patches * video.pw && column < strip.columns) {
    const PatchPixels<T> x = reference_pixels<T>(video, b, first - 1, py, px);
    for (int64_t c = 0; c < video.C; ++c)
      for (int64_t frame = 0; frame < compared_frames(video); ++frame)
        for (int64_t y = 0; y < strip.rows; ++y)
          *reinterpret_cast<Word*>(kept + c * before.channel + frame * before.frame + y * kRow + column) =
              *reinterpret_cast<const Word*>(x.at + c * x.channel + frame * x.frame + y * x.row + column);
  }
  for (int64_t t = first; t < end; ++t, to += video.h * video.w) {
    const PatchPixels<T> x = step_pixels<T>(video, b, t, py, px);
    const PatchPixels<T> r = staged ? before : reference_pixels<T>(video, b, t - 1, py, px);
    const accumulator_t<T> score = score_strip<T, Word, kKind>(video, strip, x, r, staged, shared, buffer);
    if (threadIdx.x < strip.patches) *to = score;
  }
}

template <class T>
cudaError_t patch_motion_launch(const T* frames, int64_t batch, int64_t frame, int64_t channel, int64_t row,
                                int64_t videos, int64_t steps, int64_t C, int64_t H, int64_t W, int64_t tubelet,
                                int64_t ph, int64_t pw, bool whole, int metric, accumulator_t<T>* scores,
                                cudaStream_t stream) {
  if (videos * steps == 0) return cudaSuccess;
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
  return dispatch_patches<T>(video, [&](auto word, auto kind) {
    using Word = decltype(word);
    const int64_t patches = strip_patches<T, Word>(video), strips = ceil_div(video.w, patches) * video.h * videos;
    const int64_t wanted = ceil_div(steps * strips, kMotionBlocks);
    const int64_t run = wanted < kMotionMinRun ? kMotionMinRun : wanted < kMotionMaxRun ? wanted : kMotionMaxRun;
    const int64_t bytes = C * compared_frames(video) * ph * kPatchThreads * sizeof(Word);
    const bool staged =
        (whole || tubelet == 1) && patches * pw <= kPatchThreads * kWordPixels<T, Word> && bytes <= kMotionStage;
    return VTOK_LAUNCH((motion_kernel<T, Word, decltype(kind)::value>), dim3(strips * ceil_div(steps, run)),
                       dim3(kPatchThreads), staged ? bytes : 0, stream, video, patches, run, staged, scores);
  });
}

VTOK_HOST_EXPORT("patch_motion_uint8", patch_motion_launch<uint8_t>)
VTOK_HOST_EXPORT("patch_motion_float32", patch_motion_launch<float>)
VTOK_HOST_EXPORT("patch_motion_float16", patch_motion_launch<f16>)
VTOK_HOST_EXPORT("patch_motion_bfloat16", patch_motion_launch<bf16>)
VTOK_HOST_EXPORT("patch_motion_float64", patch_motion_launch<double>)

}  // namespace vtok
