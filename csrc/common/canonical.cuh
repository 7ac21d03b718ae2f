// The canonical order of sums (vtok/ops/_canonical.py) on CUDA. A warp takes a segment of 512 values; thread t has its
// lanes 2t and 2t+1, in 8 steps. The lanes of all segments meet in shared memory and one warp adds and folds them.
#pragma once

#include "common/kernel.h"

namespace vtok {

constexpr int kCanonicalLanes = 64;
constexpr int kCanonicalSegment = 512;
constexpr int kCanonicalSteps = kCanonicalSegment / kCanonicalLanes;

VTOK_DEVICE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
VTOK_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
VTOK_DEVICE double sub_rn(double a, double b) { return __dsub_rn(a, b); }
VTOK_DEVICE double sqrt_rn(double a) { return __dsqrt_rn(a); }

// Two neighbouring values or sums, and how a thread keeps them: 16-bit values share a register.
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};
template <class T>
struct TwoWord {
  using type = Two<T>;
};
template <>
struct TwoWord<bf16> {
  using type = uint32_t;
};
template <>
struct TwoWord<f16> {
  using type = uint32_t;
};

// What one thread holds of a segment of a row.
template <class T>
struct Fragment {
  using Word = typename TwoWord<T>::type;
  Word words[kCanonicalSteps];
};

// The thread's values from `from` on; those `left` or more beyond it are zeros and not looked at. kPairs: both are
// even.
template <bool kPairs, class T>
VTOK_DEVICE void load_fragment(const T* from, int left, Fragment<T>& out) {
#pragma unroll
  for (int step = 0; step < kCanonicalSteps; ++step) {
    using Word = typename Fragment<T>::Word;
    const int i = step * kCanonicalLanes;
    if constexpr (kPairs) {
      out.words[step] = i < left ? *reinterpret_cast<const Word*>(from + i) : Word{};
    } else {
      out.words[step] = bit_cast<Word>(Two<T>{i < left ? from[i] : T{}, i + 1 < left ? from[i + 1] : T{}});
    }
  }
}

// The inverse of load_fragment.
template <bool kPairs, class T>
VTOK_DEVICE void store_fragment(const Fragment<T>& from, int left, T* to) {
#pragma unroll
  for (int step = 0; step < kCanonicalSteps; ++step) {
    const int i = step * kCanonicalLanes;
    const auto two = bit_cast<Two<T>>(from.words[step]);
    if constexpr (kPairs) {
      if (i < left) *reinterpret_cast<Two<T>*>(to + i) = two;
    } else {
      if (i < left) to[i] = two.x;
      if (i + 1 < left) to[i + 1] = two.y;
    }
  }
}

// What a pair of values adds to which sums.
struct DotAndNorm {  // a·b and |b|²
  static constexpr int kSums = 2;
  template <class A>
  VTOK_DEVICE void add(A a, A b, A (&sums)[2]) {
    sums[0] = add_rn(sums[0], mul_rn(a, b));
    sums[1] = add_rn(sums[1], mul_rn(b, b));
  }
};
struct DotAndNorms {  // a·b, |a|² and |b|²
  static constexpr int kSums = 3;
  template <class A>
  VTOK_DEVICE void add(A a, A b, A (&sums)[3]) {
    sums[0] = add_rn(sums[0], mul_rn(a, b));
    sums[1] = add_rn(sums[1], mul_rn(a, a));
    sums[2] = add_rn(sums[2], mul_rn(b, b));
  }
};
struct SquaredDistance {  // |a - b|²
  static constexpr int kSums = 1;
  template <class A>
  VTOK_DEVICE void add(A a, A b, A (&sums)[1]) {
    const A difference = sub_rn(b, a);
    sums[0] = add_rn(sums[0], mul_rn(difference, difference));
  }
};

// The lanes of a segment, of each sum.
template <class Terms, class A>
struct SegmentLanes {
  Two<A> sums[Terms::kSums][kWarp];
};

template <class Terms, class A, class T>
VTOK_DEVICE void add_segment(const Fragment<A>& a, const Fragment<T>& b, SegmentLanes<Terms, accumulator_t<T>>& lanes) {
  accumulator_t<T> x[Terms::kSums] = {}, y[Terms::kSums] = {};
#pragma unroll
  for (int step = 0; step < kCanonicalSteps; ++step) {
    const auto a_two = bit_cast<Two<A>>(a.words[step]);
    const auto b_two = bit_cast<Two<T>>(b.words[step]);
    Terms::add(widen(a_two.x), widen(b_two.x), x);
    Terms::add(widen(a_two.y), widen(b_two.y), y);
  }
#pragma unroll
  for (int s = 0; s < Terms::kSums; ++s) lanes.sums[s][threadIdx.x] = Two<accumulator_t<T>>{x[s], y[s]};
}

// Adds a segment's lanes to those of the segments before it.
template <class A>
VTOK_DEVICE void add_lanes(Two<A>& total, const Two<A>& lanes) {
  total.x = add_rn(total.x, lanes.x);
  total.y = add_rn(total.y, lanes.y);
}

// t[l] += t[l + h] for h = 32, 16, 8, 4, 2 between threads, then 1 within one; the whole warp, the sum in every thread.
template <class A>
VTOK_DEVICE A fold_lanes(Two<A> lanes) {
#pragma unroll
  for (int h = kWarp / 2; h; h /= 2) {
    lanes.x = add_rn(lanes.x, __shfl_xor_sync(kFullMask, lanes.x, h));
    lanes.y = add_rn(lanes.y, __shfl_xor_sync(kFullMask, lanes.y, h));
  }
  return add_rn(lanes.x, lanes.y);
}

// dot / max(sqrt(norm_a * norm_b), eps) of squared norms; NaN stays NaN.
template <class A>
VTOK_DEVICE A canonical_cosine(A dot, A norm_a, A norm_b, A eps) {
  const A root = sqrt_rn(mul_rn(norm_a, norm_b));
  return div_rn(dot, root < eps ? eps : root);
}

}  // namespace vtok
