#include <algorithm>

#include "common/patch_check.h"
#include "patch_motion/patch_motion_cpu.inc"

namespace vtok {
namespace {

constexpr int64_t kStripBytes = 128 * 1024;  // of a step of a strip: three steps fit the second-level cache

Tensor patch_motion(const Tensor& frames, std::vector<int64_t> patch, int64_t tubelet, const StringArg& metric,
                    const StringArg& span, bool pad) {
  PatchVideo video = expect_patches("patch_motion", frames, patch, tubelet, metric, span, pad);
  Tensor scores = empty(frames, {video.videos, video.steps, video.h, video.w}, score_type(frames));
  const Tensor source = dense_pixels(frames);
  set_pixels(video, source);
  const int64_t itemsize = static_cast<int64_t>(frames.element_size());
  const int64_t bytes = patch_values(video) * itemsize;  // of a patch
  const int64_t most = std::clamp<int64_t>(kStripBytes / bytes, 1, video.w), strips = (video.w - 1) / most + 1;
  const int64_t patches = (video.w - 1) / strips + 1;
  const PatchMotionCpu& cpu = patch_motion_cpu();
  void* to = scores.mutable_data_ptr();
  torch::stable::parallel_for(0, video.videos * video.h * strips * video.steps, grain(patches * bytes),
                              [&](int64_t begin, int64_t end) {
                                switch (frames.scalar_type()) {
                                  case ScalarType::Byte: return cpu.u8(video, patches, to, begin, end);
                                  case ScalarType::Float: return cpu.f32(video, patches, to, begin, end);
                                  case ScalarType::Half: return cpu.f16(video, patches, to, begin, end);
                                  case ScalarType::BFloat16: return cpu.bf16(video, patches, to, begin, end);
                                  default: return cpu.f64(video, patches, to, begin, end);
                                }
                              });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_patch_motion); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("patch_motion", TORCH_BOX(&patch_motion)); }

}  // namespace vtok
