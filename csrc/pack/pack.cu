#include "pack/pack.cuh"

#include "common/cuda.h"

namespace vtok {

void check_pack(const Tensor& tokens, const Tensor& index);  // pack.cpp

namespace {

Tensor pack(const Tensor& tokens, const Tensor& index) {
  check_pack(tokens, index);
  const CudaScope scope(tokens);
  const Tensor source = dense_rows(tokens), order = torch::stable::contiguous(index);
  Tensor out = empty(tokens, {index.size(0), tokens.size(1)}, tokens.scalar_type());
  if (out.numel() == 0) return out;
  const auto size = static_cast<int64_t>(tokens.element_size());
  check_launch("pack",
               pack_launch(source.const_data_ptr(), tokens.size(0), source.stride(0) * size, tokens.size(1) * size,
                           indices(order), index.size(0), out.mutable_data_ptr(), scope.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtok, CUDA, m) { m.impl("pack", TORCH_BOX(&pack)); }

}  // namespace vtok
