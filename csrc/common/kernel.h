// What a .cuh sees: CUDA under nvcc, the fibers of host.h elsewhere. No torch header. The kernels use
//   VTOK_SHARED(Type, name)   one block's static shared memory (a struct or an array type)
//   VTOK_DYNAMIC_SHARED(name) one block's dynamic shared memory, 16-byte aligned, as char*
//   VTOK_LAUNCH(kernel, grid, block, dynamic shared bytes, stream, arguments...)  evaluates to a cudaError_t
//   VTOK_HOST_EXPORT(name, launcher)  makes a launcher callable from the tests
// and spin only through spin_yield(). Sizes and addresses are int64_t.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define VTOK_SHARED(Type, name) __shared__ Type name
#define VTOK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define VTOK_HOST_EXPORT(name, launcher)

namespace vtok {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared > 0) {  // static shared memory counts against the 48 KB that need no leave
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

__device__ __forceinline__ void spin_yield() { __nanosleep(20); }

}  // namespace vtok

#define VTOK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::vtok::launch(kernel, grid, block, shared, stream, __VA_ARGS__)

#else
#include "common/host.h"
#endif

#include "common/half.h"

#define VTOK_DEVICE __device__ __forceinline__ static

namespace vtok {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 16 bytes moved as one word.
struct alignas(16) Word16 {
  uint32_t w[4];
};

// One 16-byte store to global memory: nvcc splits the copy of a word put together from smaller values in registers.
VTOK_DEVICE void store_word(Word16* to, Word16 x) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.w[0]), "r"(x.w[1]),
               "r"(x.w[2]), "r"(x.w[3])
               : "memory");
#else
  *to = x;
#endif
}
template <class Word>
VTOK_DEVICE void store_word(Word* to, Word x) {
  *to = x;
}

// Arithmetic that no compiler contracts, rounded to nearest even.
VTOK_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
VTOK_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
VTOK_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
VTOK_DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
VTOK_DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
VTOK_DEVICE double div_rn(double a, double b) { return __ddiv_rn(a, b); }

// Integer sums come out the same in any order.
VTOK_DEVICE int64_t atomic_add(int64_t* sum, int64_t value) {
  return static_cast<int64_t>(
      atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value)));
}

// The video that row s belongs to: the last v with cu[v] <= s, by binary search; videos >= 1.
VTOK_DEVICE int64_t find_video(const int64_t* cu, int64_t videos, int64_t s) {
  int64_t low = 0, high = videos;  // cu[low] <= s, and s < cu[high] where high < videos
  while (high - low > 1) {
    const int64_t mid = low + (high - low) / 2;
    if (cu[mid] <= s) low = mid;
    else high = mid;
  }
  return low;
}

}  // namespace vtok
