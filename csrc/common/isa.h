// What a _cpu.inc sees. Each .inc is compiled once per instruction set in a translation unit of its own that defines
// VTOK_ISA; everything here has internal linkage and no std header comes in, so that wide instructions cannot leak
// into the baseline through a shared symbol.
#pragma once

#include <stdint.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/half.h"

namespace vtok {

// Floats per native vector of this instruction set.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef double vdouble __attribute__((vector_size(4 * kLanes), aligned(8), may_alias));  // half as many lanes
typedef uint32_t vword __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

static inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat*>(p); }
static inline void store(float* p, vfloat x) { *reinterpret_cast<vfloat*>(p) = x; }
static inline vdouble load(const double* p) { return *reinterpret_cast<const vdouble*>(p); }
static inline void store(double* p, vdouble x) { *reinterpret_cast<vdouble*>(p) = x; }

// The numbers of a vector's lanes, for shuffles.
template <int... I>
struct Lanes {};
template <int kCount, int... I>
struct FirstLanes : FirstLanes<kCount - 1, kCount - 1, I...> {};
template <int... I>
struct FirstLanes<0, I...> {
  using type = Lanes<I...>;
};
constexpr FirstLanes<kLanes>::type kAllLanes;

static inline vfloat load(const f16* p) {  // maskz: gcc 12 warns of the plain forms' undefined pass-through
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat out;
  for (int i = 0; i < kLanes; ++i) out[i] = widen(p[i]);
  return out;
#endif
}

// 2 * kLanes bf16 values as two vectors: those at even and those at odd places. A bf16 pair is one 32-bit word, so
// a shift and a mask widen it; nothing is shuffled.
static inline void load_pairs(const bf16* p, vfloat& even, vfloat& odd) {
  const vword words = *reinterpret_cast<const vword*>(p);
  even = (vfloat)(words << 16);
  odd = (vfloat)(words & 0xffff0000u);
}

// The inverse, rounding to nearest even.
static inline vword bf16_in_high_half(vfloat x) {
  const vword bits = (vword)x;
  return x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}
static inline void store_pairs(bf16* p, vfloat even, vfloat odd) {
  *reinterpret_cast<vword*>(p) = bf16_in_high_half(even) >> 16 | (bf16_in_high_half(odd) & 0xffff0000u);
}

// Rows of any dtype to float32 and back, n values.
static inline void widen_row(const float* from, float* to, int64_t n) { __builtin_memcpy(to, from, 4 * n); }
static inline void widen_row(const double* from, double* to, int64_t n) { __builtin_memcpy(to, from, 8 * n); }
static inline void widen_row(const bf16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
static inline void widen_row(const f16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}

static inline void narrow_row(const float* from, float* to, int64_t n) { __builtin_memcpy(to, from, 4 * n); }
static inline void narrow_row(const double* from, double* to, int64_t n) { __builtin_memcpy(to, from, 8 * n); }
static inline void narrow_row(const float* from, bf16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<bf16>(from[i]);
}
static inline void narrow_row(const float* from, f16* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + kLanes <= n; i += kLanes)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from + i), 0));
#elif defined(__F16C__)
  for (; i + kLanes <= n; i += kLanes)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; ++i) to[i] = narrow<f16>(from[i]);
}

}  // namespace vtok
