// L pixels of any dtype as one vector of float32, for any L and instruction set: a strip of 14 is two of 8 that
// overlap, whatever the widest vector. Internal linkage, as in isa.h.
#pragma once

#include "common/isa.h"

namespace vtok {
namespace {

template <int L>
struct Lanes {
  typedef float f32 __attribute__((vector_size(4 * L)));
  typedef uint32_t u32 __attribute__((vector_size(4 * L)));
  typedef int32_t i32 __attribute__((vector_size(4 * L)));
  typedef uint16_t u16 __attribute__((vector_size(2 * L)));
  typedef uint8_t u8 __attribute__((vector_size(L)));
};

template <class Vector>
inline Vector load_vector(const void* from) {
  Vector x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

template <int L>
inline typename Lanes<L>::f32 load_lanes(const float* from) {
  return load_vector<typename Lanes<L>::f32>(from);
}
template <int L>
inline typename Lanes<L>::f32 load_lanes(const uint8_t* from) {
  using Integers = typename Lanes<L>::i32;
#if defined(__AVX512F__)
  if constexpr (L == 16)
    return __builtin_convertvector((Integers)_mm512_maskz_cvtepu8_epi32(0xffff, load_vector<__m128i>(from)),
                                   typename Lanes<L>::f32);
#endif
#if defined(__AVX2__)
  if constexpr (L == 8)
    return __builtin_convertvector((Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)),
                                   typename Lanes<L>::f32);
#endif
  const auto halves = __builtin_convertvector(load_vector<typename Lanes<L>::u8>(from), typename Lanes<L>::u16);
  return __builtin_convertvector(__builtin_convertvector(halves, Integers), typename Lanes<L>::f32);
}
template <int L>
inline typename Lanes<L>::f32 load_lanes(const bf16* from) {
  const auto halves = load_vector<typename Lanes<L>::u16>(from);
  return (typename Lanes<L>::f32)(__builtin_convertvector(halves, typename Lanes<L>::u32) << 16);
}
template <int L>
inline typename Lanes<L>::f32 load_lanes(const f16* from) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (typename Lanes<L>::f32)_mm512_maskz_cvtph_ps(0xffff, load_vector<__m256i>(from));
#endif
#if defined(__F16C__)
  if constexpr (L == 8) return (typename Lanes<L>::f32)_mm256_cvtph_ps(load_vector<__m128i>(from));
  if constexpr (L == 4) return (typename Lanes<L>::f32)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from));
#endif
  float x[L];
  for (int i = 0; i < L; ++i) x[i] = widen(from[i]);
  return load_vector<typename Lanes<L>::f32>(x);
}

template <int L>
inline void store_lanes(float* to, typename Lanes<L>::f32 x) {
  __builtin_memcpy(to, &x, sizeof(x));
}
template <int L>
inline void store_lanes(bf16* to, typename Lanes<L>::f32 x) {
  const auto bits = (typename Lanes<L>::u32)x;
  const auto rounded = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto halves = __builtin_convertvector(rounded >> 16, typename Lanes<L>::u16);
  __builtin_memcpy(to, &halves, sizeof(halves));
}
template <int L>
inline void store_lanes(f16* to, typename Lanes<L>::f32 x) {
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0);
    __builtin_memcpy(to, &halves, sizeof(halves));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (L == 8) {
    const __m128i halves = _mm256_cvtps_ph((__m256)x, 0);
    __builtin_memcpy(to, &halves, sizeof(halves));
    return;
  }
#endif
  for (int i = 0; i < L; ++i) to[i] = narrow<f16>(x[i]);
}

}  // namespace
}  // namespace vtok
