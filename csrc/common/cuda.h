// What a .cu needs beside stable.h: the current stream and launch errors as exceptions. The stream shim is weak, so
// that the same library loads where torch has no CUDA.
#pragma once

#include <cuda_runtime.h>

#include "common/stable.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace vtok {

// Makes the tensor's device current for the life of the object and knows its current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    if (!aoti_torch_get_current_cuda_stream ||
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != AOTI_TORCH_SUCCESS)
      throw std::runtime_error("vtok: expected a torch built with CUDA, got one without its stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_launch(const char* op, cudaError_t error) {
  VTOK_EXPECT(error == cudaSuccess, op, "a CUDA launch", cudaGetErrorString(error));
}

}  // namespace vtok
