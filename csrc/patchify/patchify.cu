#include "patchify/patchify.cuh"

#include "common/cuda.h"
#include "patchify/patchify_call.h"

namespace vtok {
namespace {

template <class In, class Out>
void launch_patchify(const Tensor& frames, const PatchifyCall& call, bool channels_last) {
  const CudaScope scope(frames);
  check_launch("patchify", patchify_launch(static_cast<const In*>(frames.const_data_ptr()), &call.grid,
                                           indices(call.sites), call.referring ? indices(call.references) : nullptr,
                                           call.moving ? indices(call.moves) : nullptr, call.out.size(0),
                                           call.scale.data(), call.shift.data(), call.scale.size() > 1, channels_last,
                                           static_cast<Out*>(call.out.mutable_data_ptr()), scope.stream()));
}

template <class In>
void launch_patchify_from(const Tensor& frames, const PatchifyCall& call, bool channels_last) {
  switch (call.out.scalar_type()) {
    case ScalarType::Float: return launch_patchify<In, float>(frames, call, channels_last);
    case ScalarType::Half: return launch_patchify<In, f16>(frames, call, channels_last);
    default: return launch_patchify<In, bf16>(frames, call, channels_last);
  }
}

Tensor patchify(const Tensor& frames, const Tensor& index, const std::vector<int64_t>& patch, int64_t tubelet,
                const std::optional<Tensor>& reference_index, const std::optional<Tensor>& vectors,
                const std::optional<std::vector<double>>& mean, const std::optional<std::vector<double>>& std,
                const std::optional<ScalarType>& dtype, const StringArg& order, bool pad) {
  const PatchifyCall call(frames, index, patch, tubelet, reference_index, vectors, {mean, std, dtype, order, pad});
  if (call.out.numel() == 0) return call.out;
  const bool channels_last = order == "thwc";
  switch (frames.scalar_type()) {
    case ScalarType::Byte: launch_patchify_from<uint8_t>(frames, call, channels_last); break;
    case ScalarType::Float: launch_patchify_from<float>(frames, call, channels_last); break;
    case ScalarType::Half: launch_patchify_from<f16>(frames, call, channels_last); break;
    case ScalarType::BFloat16: launch_patchify_from<bf16>(frames, call, channels_last); break;
    default: launch_patchify<double, double>(frames, call, channels_last);
  }
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("patchify", TORCH_BOX(&patchify)); }

}  // namespace vtok
