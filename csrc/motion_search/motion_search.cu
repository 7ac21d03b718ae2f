#include "motion_search/motion_search.cuh"

#include "common/cuda.h"
#include "motion_search/motion_search_args.h"

namespace vtok {
namespace {

std::tuple<Tensor, Tensor> motion_search(const Tensor& frames, std::vector<int64_t> patch, int64_t radius,
                                         int64_t tubelet, const StringArg& metric, const StringArg& span, double bias,
                                         bool pad) {
  const PatchVideo video = expect_search(frames, patch, radius, tubelet, metric, span, bias, pad);
  const CudaScope scope(frames);
  const SearchTensors tensors = prepare_search(frames, video, radius, bias);
  dispatch_pixels(frames.scalar_type(), [&](auto zero) {
    check_launch("motion_search", motion_search_launch<decltype(zero)>(tensors.search, scope.stream()));
  });
  return {tensors.motion, tensors.vectors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("motion_search", TORCH_BOX(&motion_search)); }

}  // namespace vtok
