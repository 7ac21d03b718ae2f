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
struct SquaredDistance {  // |a - b|²
  static constexpr int kSums = 1;
  template <class V>
  static inline void add(V (&sums)[1], V a, V b) {
    const V difference = b - a;
    sums[0] = sums[0] + difference * difference;
  }
};

template <class Terms, class T>
struct CanonicalSums {
  using A = accumulator_t<T>;
  using V = typename NativeVector<A>::type;
  static constexpr int kPair = 2 * sizeof(V) / sizeof(A);
  static constexpr int kPairs = kCanonicalLanes / kPair;

  V total[kPairs][2][Terms::kSums] = {};

  // One segment of `steps` times 64 values; `ahead` is fetched into the second-level cache meanwhile.
  inline void add_segment(const T* a, const T* b, int steps, const T* ahead) {
    V partial[kPairs][2][Terms::kSums] = {};
#pragma GCC unroll 1
    for (int at = 0; at < steps * kCanonicalLanes; at += kCanonicalLanes) {
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        V a0, a1, b0, b1;
        load_two(a + at + p * kPair, a0, a1);
        load_two(b + at + p * kPair, b0, b1);
        Terms::add(partial[p][0], a0, b0);
        Terms::add(partial[p][1], a1, b1);
      }
      for (uint64_t byte = 0; byte < kCanonicalLanes * sizeof(T); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(ahead + at) + byte, 0, 2);
    }
    for (int p = 0; p < kPairs; ++p)
      for (int half = 0; half < 2; ++half)
        for (int s = 0; s < Terms::kSums; ++s) total[p][half][s] = total[p][half][s] + partial[p][half][s];
  }

  // The segment's last 64 may be incomplete: zeros fill it up.
  inline void add_rest(const T* a, const T* b, int64_t count, const T* ahead) {
    T rest[2][kCanonicalSegment] = {};
    __builtin_memcpy(rest[0], a, count * sizeof(T));
    __builtin_memcpy(rest[1], b, count * sizeof(T));
    add_segment(rest[0], rest[1], static_cast<int>((count + kCanonicalLanes - 1) / kCanonicalLanes), ahead);
  }

  inline void fold(A (&sums)[Terms::kSums]) {
    for (int half = kPairs / 2; half; half /= 2)
      for (int p = 0; p < half; ++p)
        for (int s = 0; s < Terms::kSums; ++s)
          for (int v = 0; v < 2; ++v) total[p][v][s] = total[p][v][s] + total[p + half][v][s];
    for (int s = 0; s < Terms::kSums; ++s)
      sums[s] = fold_pair(static_cast<const T*>(nullptr), total[0][0][s], total[0][1][s]);
  }
};

// The sums over two rows of D values; `ahead` is the row that is needed next.
template <class Terms, class T>
static inline void canonical_sums(const T* a, const T* b, int64_t D, const T* ahead,
                                  accumulator_t<T> (&sums)[Terms::kSums]) {
  CanonicalSums<Terms, T> rows;
  int64_t i = 0;
  for (; i + kCanonicalSegment <= D; i += kCanonicalSegment) rows.add_segment(a + i, b + i, 8, ahead + i);
  const int64_t left = D - i;
  if (left % kCanonicalLanes) rows.add_rest(a + i, b + i, left, ahead + i);
  else if (left) rows.add_segment(a + i, b + i, static_cast<int>(left / kCanonicalLanes), ahead + i);
  rows.fold(sums);
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
