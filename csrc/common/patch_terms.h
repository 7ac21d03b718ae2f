// Pixels in native vectors, two of which are a block of neighbouring columns, and what a pair of pixels adds to the
// sums of its column.
#pragma once

#include "common/isa.h"

namespace vtok {
namespace {

typedef int16_t vshort __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int64_t vlong __attribute__((vector_size(4 * kLanes), aligned(8), may_alias));

inline void widen_to(const float* p, vfloat& x) { x = load(p); }
inline void widen_to(const f16* p, vfloat& x) { x = load(p); }
inline void widen_to(const double* p, vdouble& x) { x = load(p); }
#if defined(__AVX512F__)  // gcc 12 takes the vectors that __builtin_convertvector widens apart
inline void widen_to(const uint8_t* p, vshort& x) {
  x = (vshort)_mm512_maskz_cvtepu8_epi16(0xffffffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void widen_to(const uint8_t* p, vint& x) {
  x = (vint)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#elif defined(__AVX2__)
inline void widen_to(const uint8_t* p, vshort& x) {
  x = (vshort)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void widen_to(const uint8_t* p, vint& x) {
  x = (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
#else
template <class T, class V>
inline void widen_to(const T* p, V& x) {
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i) x[i] = p[i];
}
#endif

// One of the two vectors of a block: its first or its second half; of bf16 the even or the odd columns (load_pairs).
template <class T, class V>
inline void widen_half(const T* p, int half, V& x) {
  widen_to(p + half * static_cast<int>(sizeof(V) / sizeof(x[0])), x);
}
inline void widen_half(const bf16* p, int half, vfloat& x) {
  vfloat even, odd;
  load_pairs(p, even, odd);
  x = half ? odd : even;
}

inline vfloat magnitude(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }
inline vdouble magnitude(vdouble x) { return (vdouble)((vlong)x & 0x7fffffffffffffff); }
inline vshort magnitude(vshort x) { return x < 0 ? -x : x; }

// Sums and their lanes, by the type of the pixels: those of uint8 stay integers.
template <class T>
struct PatchSums {
  using Sum = float;
  using V = vfloat;
  using Narrow = vfloat;
  static constexpr float kLeast = -__builtin_inff();
};
template <>
struct PatchSums<double> {
  using Sum = double;
  using V = vdouble;
  using Narrow = vdouble;
  static constexpr double kLeast = -__builtin_inf();
};
template <>
struct PatchSums<uint8_t> {
  using Sum = int64_t;
  using V = vint;
  using Narrow = vshort;  // sums of differences, but not of squares
  static constexpr int kLeast = -256;
};
template <class T>
using patch_sum_t = typename PatchSums<T>::Sum;

// The values of a block between their columns' order and that of widen_half for bf16.
template <int... I>
inline void join_pairs(float* block, Lanes<I...>) {
  const vfloat even = load(block), odd = load(block + kLanes);
  store(block, (vfloat)__builtin_shufflevector(even, odd, (I / 2 + I % 2 * kLanes)...));
  store(block + kLanes, (vfloat)__builtin_shufflevector(even, odd, ((I + kLanes) / 2 + I % 2 * kLanes)...));
}
template <int... I>
inline void split_pairs(float* block, Lanes<I...>) {
  const vfloat first = load(block), second = load(block + kLanes);
  store(block, (vfloat)__builtin_shufflevector(first, second, (2 * I)...));
  store(block + kLanes, (vfloat)__builtin_shufflevector(first, second, (2 * I + 1)...));
}

// What a pair of pixels adds to which sums, and which most values it raises; `mean` of x and r where kCentred.
template <class T>
struct AbsoluteTerms {
  using V = typename PatchSums<T>::Narrow;
  static constexpr int kSums = 1, kMost = 0;
  static constexpr bool kCentred = false;
  static inline void add(V (&sums)[1], V x, V r, const V (&)[2]) { sums[0] = sums[0] + magnitude(x - r); }
};
template <class T>
struct SquareTerms {
  using V = typename PatchSums<T>::V;
  static constexpr int kSums = 1, kMost = 0;
  static constexpr bool kCentred = false;
  static inline void add(V (&sums)[1], V x, V r, const V (&)[2]) {
    const V difference = x - r;
    sums[0] = sums[0] + difference * difference;
  }
};
// x, r, then the most of x, -x, r, -r.
template <class V>
inline void add_levels(V* sums, V* most, V x, V r) {
  sums[0] = sums[0] + x;
  sums[1] = sums[1] + r;
  most[0] = x > most[0] ? x : most[0];
  most[1] = -x > most[1] ? -x : most[1];
  most[2] = r > most[2] ? r : most[2];
  most[3] = -r > most[3] ? -r : most[3];
}
template <class T>
struct LevelTerms {
  using V = typename PatchSums<T>::V;
  static constexpr int kSums = 2, kMost = 4;
  static constexpr bool kCentred = false;
  static inline void add(V (&sums)[6], V x, V r, const V (&)[2]) { add_levels(sums, sums + 2, x, r); }
};
// Integers need one pass: x, r, x², r², x·r, then the most of x, -x, r, -r.
template <class T>
struct MomentTerms {
  using V = typename PatchSums<T>::V;
  static constexpr int kSums = 5, kMost = 4;
  static constexpr bool kCentred = false;
  static inline void add(V (&sums)[9], V x, V r, const V (&)[2]) {
    add_levels(sums, sums + 5, x, r);
    sums[2] = sums[2] + x * x;
    sums[3] = sums[3] + r * r;
    sums[4] = sums[4] + x * r;
  }
};
template <class T>
struct CentredTerms {
  using V = typename PatchSums<T>::V;
  static constexpr int kSums = 3, kMost = 0;
  static constexpr bool kCentred = true;
  static inline void add(V (&sums)[3], V x, V r, const V (&mean)[2]) {
    const V a = x - mean[0], b = r - mean[1];
    sums[0] = sums[0] + a * a;
    sums[1] = sums[1] + b * b;
    sums[2] = sums[2] + a * b;
  }
};

}  // namespace
}  // namespace vtok
