#include "motion_search/motion_search_args.h"
#include "motion_search/motion_search_cpu.inc"

namespace vtok {
namespace {

std::tuple<Tensor, Tensor> motion_search(const Tensor& frames, std::vector<int64_t> patch, int64_t radius,
                                         int64_t tubelet, const StringArg& metric, const StringArg& span, double bias,
                                         bool pad) {
  const PatchVideo video = expect_search(frames, patch, radius, tubelet, metric, span, bias, pad);
  const SearchTensors tensors = prepare_search(frames, video, radius, bias);
  const MotionSearch& search = tensors.search;
  const int64_t patches = search_patches(search.video), strips = (video.w - 1) / patches + 1;
  const int64_t bytes = patch_values(video) * static_cast<int64_t>(frames.element_size()) * patches;
  const MotionSearchCpu& cpu = motion_search_cpu();
  torch::stable::parallel_for(0, video.videos * video.h * strips * video.steps,
                              grain(bytes * (2 * search.ry + 1) * (2 * search.rx + 1)),
                              [&](int64_t begin, int64_t end) {
                                switch (frames.scalar_type()) {
                                  case ScalarType::Byte: return cpu.u8(search, begin, end);
                                  case ScalarType::Float: return cpu.f32(search, begin, end);
                                  case ScalarType::Half: return cpu.f16(search, begin, end);
                                  case ScalarType::BFloat16: return cpu.bf16(search, begin, end);
                                  default: return cpu.f64(search, begin, end);
                                }
                              });
  return {tensors.motion, tensors.vectors};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_motion_search); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("motion_search", TORCH_BOX(&motion_search)); }

}  // namespace vtok
