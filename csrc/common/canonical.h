// The canonical order of sums (vtok/ops/_canonical.py) for the CPU kernels. A native vector holds neighbouring lanes,
// or for bf16 the even or the odd ones of a pair of vectors; the fold puts them back in order.
#pragma once

#include "common/isa.h"

namespace vtok {

constexpr int kCanonicalLanes = 64;
constexpr int kCanonicalSegment = 512;

template <class A>
struct NativeVector {
  using type = vfloat;
};
template <>
struct NativeVector<double> {
  using type = vdouble;
};

// Two vectors' worth of consecutive values, widened.
template <class T, class V>
static inline void load_two(const T* p, V& first, V& second) {
  first = load(p);
  second = load(p + sizeof(V) / sizeof(accumulator_t<T>));
}
static inline void load_two(const bf16* p, vfloat& even, vfloat& odd) { load_pairs(p, even, odd); }

// t[l] += t[l + h] within one vector.
typedef float vfloat4 __attribute__((vector_size(16)));
typedef double vdouble2 __attribute__((vector_size(16)));
static inline float fold_lanes(vfloat4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
static inline double fold_lanes(vdouble2 x) { return x[0] + x[1]; }
#if defined(__AVX2__)
typedef float vfloat8 __attribute__((vector_size(32)));
typedef double vdouble4 __attribute__((vector_size(32)));
static inline float fold_lanes(vfloat8 x) {
  return fold_lanes(__builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7));
}
static inline double fold_lanes(vdouble4 x) {
  return fold_lanes(__builtin_shufflevector(x, x, 0, 1) + __builtin_shufflevector(x, x, 2, 3));
}
#endif
#if defined(__AVX512F__)
typedef float vfloat16 __attribute__((vector_size(64)));
typedef double vdouble8 __attribute__((vector_size(64)));
static inline float fold_lanes(vfloat16 x) {
  return fold_lanes(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
}
static inline double fold_lanes(vdouble8 x) {
  return fold_lanes(__builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7));
}
#endif

template <class V>
static inline auto fold_pair(const float*, V first, V second) {
  return fold_lanes(first + second);
}
template <class V>
static inline auto fold_pair(const f16*, V first, V second) {
  return fold_lanes(first + second);
}
template <class V>
static inline auto fold_pair(const double*, V first, V second) {
  return fold_lanes(first + second);
}
template <class V>
static inline auto fold_pair(const bf16*, V even, V odd) {
  return fold_lanes(even) + fold_lanes(odd);
}

// What a pair of values adds to which sums.
struct DotAndNorm {  // a·b and |b|²
  static constexpr int kSums = 2;
  template <class V>
  static inline void add(V (&sums)[2], V a, V b) {
    sums[0] = sums[0] + a * b;
    sums[1] = sums[1] + b * b;
  }
};
struct DotAndNorms {  // a·b, |a|² and |b|²
  static constexpr int kSums = 3;
  template <class V>
  static inline void add(V (&sums)[3], V a, V b) {
    sums[0] = sums[0] + a * b;
    sums[1] = sums[1] + a * a;
    sums[2] = sums[2] + b * b;
  }
};
struct SquaredDistance {  // |a - b|²
  static constexpr int kSums = 1;
  template <class V>
  static inline void add(V (&sums)[1], V a, V b) {
    const V difference = b - a;
    sums[0] = sums[0] + difference * difference;
  }
};

// All lanes of the sums of two rows: vectors in pairs, as load_two brings them.
template <class Terms, class T>
struct CanonicalLanes {
  using A = accumulator_t<T>;
  using V = typename NativeVector<A>::type;
  static constexpr int kPair = 2 * sizeof(V) / sizeof(A);
  static constexpr int kPairs = kCanonicalLanes / kPair;
  V pairs[kPairs][2][Terms::kSums] = {};

  inline void add(const CanonicalLanes& other) {
    for (int p = 0; p < kPairs; ++p)
      for (int half = 0; half < 2; ++half)
        for (int s = 0; s < Terms::kSums; ++s) pairs[p][half][s] = pairs[p][half][s] + other.pairs[p][half][s];
  }

  // One segment of `steps` times 64 values; `ahead` is fetched into the second-level cache meanwhile.
  inline void add_segment(const T* a, const T* b, int steps, const T* ahead) {
    CanonicalLanes segment;
#pragma GCC unroll 1
    for (int at = 0; at < steps * kCanonicalLanes; at += kCanonicalLanes) {
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        V a0, a1, b0, b1;
        load_two(a + at + p * kPair, a0, a1);
        load_two(b + at + p * kPair, b0, b1);
        Terms::add(segment.pairs[p][0], a0, b0);
        Terms::add(segment.pairs[p][1], a1, b1);
      }
      for (uint64_t byte = 0; byte < kCanonicalLanes * sizeof(T); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(ahead + at) + byte, 0, 2);
    }
    add(segment);
  }

  inline void fold(A (&sums)[Terms::kSums]) {
    for (int half = kPairs / 2; half; half /= 2)
      for (int p = 0; p < half; ++p)
        for (int s = 0; s < Terms::kSums; ++s)
          for (int v = 0; v < 2; ++v) pairs[p][v][s] = pairs[p][v][s] + pairs[p + half][v][s];
    for (int s = 0; s < Terms::kSums; ++s)
      sums[s] = fold_pair(static_cast<const T*>(nullptr), pairs[0][0][s], pairs[0][1][s]);
  }
};

template <class T>
static inline const T* filled_up(const T* from, int64_t count, T (&to)[kCanonicalSegment]) {
  __builtin_memset(to, 0, sizeof(to));
  __builtin_memcpy(to, from, count * sizeof(T));
  return to;
}

// The sums over two rows of D values; `ahead` is a row that is needed soon.
template <class Terms, class T>
static inline void canonical_sums(const T* a, const T* b, int64_t D, const T* ahead,
                                  accumulator_t<T> (&sums)[Terms::kSums]) {
  CanonicalLanes<Terms, T> lanes;
  T rest_a[kCanonicalSegment], rest_b[kCanonicalSegment];
  for (int64_t i = 0; i < D; i += kCanonicalSegment) {
    const int64_t left = D - i < kCanonicalSegment ? D - i : kCanonicalSegment;
    const int steps = static_cast<int>((left + kCanonicalLanes - 1) / kCanonicalLanes);
    const bool whole = left == steps * kCanonicalLanes;  // else zeros fill up the last 64
    lanes.add_segment(whole ? a + i : filled_up(a + i, left, rest_a), whole ? b + i : filled_up(b + i, left, rest_b),
                      steps, ahead + i);
  }
  lanes.fold(sums);
}

static inline float square_root(float x) { return __builtin_sqrtf(x); }
static inline double square_root(double x) { return __builtin_sqrt(x); }

// dot / max(sqrt(norm_a * norm_b), eps) of squared norms; NaN stays NaN.
template <class A>
static inline A canonical_cosine(A dot, A norm_a, A norm_b, A eps) {
  const A root = square_root(norm_a * norm_b);
  return dot / (root < eps ? eps : root);
}

}  // namespace vtok
