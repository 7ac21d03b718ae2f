// 16-bit floats as storage. Kernels see only vtok::bf16 and vtok::f16 and convert here, so that the CPU build, nvcc
// and the host build of the CUDA kernels round the same way: to nearest even, NaN stays NaN.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define VTOK_BOTH __host__ __device__ __forceinline__ static
#else
#define VTOK_BOTH static inline
#endif

namespace vtok {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
VTOK_BOTH To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

VTOK_BOTH float widen(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
VTOK_BOTH float widen(float x) { return x; }
VTOK_BOTH double widen(double x) { return x; }

VTOK_BOTH float widen(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(bit_cast<__half>(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN (made quiet, as the hardware does)
    const uint32_t mantissa = (magnitude & 0x3ffu) << 13;
    return bit_cast<float>(sign | 0x7f800000u | mantissa | (mantissa ? 0x400000u : 0u));
  }
  if (magnitude >= 0x400u) return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact
  return bit_cast<float>(sign | bit_cast<uint32_t>(subnormal));
#endif
}

// The same for kernels that work in float32 alone: float64 is rounded to it.
template <class T>
VTOK_BOTH float to_float(T x) {
  return static_cast<float>(widen(x));
}

VTOK_BOTH double round_to(double x, double) { return x; }
VTOK_BOTH float round_to(float x, float) { return x; }

VTOK_BOTH bf16 round_to(float x, bf16) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

VTOK_BOTH f16 round_to(float x, f16) {
#ifdef __CUDA_ARCH__
  return f16{bit_cast<uint16_t>(__float2half_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu))};
  if (magnitude >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return f16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// The type sums are kept in: float32, or float64 for float64 inputs.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

template <class T>
VTOK_BOTH T narrow(accumulator_t<T> x) {
  return round_to(x, T{});
}

}  // namespace vtok
