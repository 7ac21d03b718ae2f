#include "patch_motion/patch_motion.cuh"

#include "common/cuda.h"
#include "common/patch_check.h"

namespace vtok {
namespace {

Tensor patch_motion(const Tensor& frames, std::vector<int64_t> patch, int64_t tubelet, const StringArg& metric,
                    const StringArg& span, bool pad) {
  PatchVideo video = expect_patches("patch_motion", frames, patch, tubelet, metric, span, pad);
  const CudaScope scope(frames);
  Tensor scores = empty(frames, {video.videos, video.steps, video.h, video.w}, score_type(frames));
  const Tensor source = dense_pixels(frames);
  set_pixels(video, source);
  dispatch_pixels(frames.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_launch("patch_motion",
                 patch_motion_launch<T>(static_cast<const T*>(video.frames), video.batch, video.frame, video.channel,
                                        video.row, video.videos, video.steps, video.C, video.H, video.W, video.tubelet,
                                        video.ph, video.pw, video.whole, static_cast<int>(video.metric),
                                        static_cast<accumulator_t<T>*>(scores.mutable_data_ptr()), scope.stream()));
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("patch_motion", TORCH_BOX(&patch_motion)); }

}  // namespace vtok
