// The distances of patches on CUDA. A thread takes a word of neighbouring columns of pixels and goes down the rows of
// its patch; the columns of a patch meet in shared memory, where one thread adds them from left to right. A word lies
// in one patch. Four pixels of uint8 are summed by one instruction: integers come out the same in any order.
#pragma once

#include <type_traits>

#include "common/kernel.h"
#include "common/patch.h"

namespace vtok {

constexpr int kPatchThreads = 128;
constexpr int kPatchBatch = 4;          // rows on their way at a time, twice as many where there is one sum
constexpr int kPatchSettled = 1 << 12;  // rows of uint8 that sums of 32 bits hold

enum class PatchKind { differences, squares, ssim };

template <class T>
struct PatchSum {
  using type = accumulator_t<T>;
};
template <>
struct PatchSum<uint8_t> {
  using type = int64_t;
};
template <class T>
using patch_sum_t = typename PatchSum<T>::type;

// A word's pixels, and its slots in shared memory: one for each column, or one in all for integers.
template <class T, class Word>
constexpr int kWordPixels = sizeof(Word) / sizeof(T);
template <class T, class Word>
constexpr int kWordSlots = sizeof(T) == 1 ? 1 : kWordPixels<T, Word>;

// What a pair of pixels adds to which sums, and which most values it raises.
struct AbsoluteRule {
  static constexpr int kSums = 1, kMost = 0;
  template <class A>
  VTOK_DEVICE void add(A (&sums)[1], A x, A r, const A (&)[2]) {
    const A d = x - r;
    sums[0] = add_rn(sums[0], d < 0 ? -d : d);
  }
  VTOK_DEVICE void add_bytes(unsigned (&sums)[1], unsigned x, unsigned r) {
    sums[0] = __dp4a(__vabsdiffu4(x, r), 0x01010101u, sums[0]);
  }
};
struct SquareRule {
  static constexpr int kSums = 1, kMost = 0;
  template <class A>
  VTOK_DEVICE void add(A (&sums)[1], A x, A r, const A (&)[2]) {
    const A d = x - r;
    sums[0] = add_rn(sums[0], mul_rn(d, d));
  }
  VTOK_DEVICE void add_bytes(unsigned (&sums)[1], unsigned x, unsigned r) {
    const unsigned d = __vabsdiffu4(x, r);
    sums[0] = __dp4a(d, d, sums[0]);
  }
};
struct LevelRule {  // x, r, and the most of x, -x, r, -r
  static constexpr int kSums = 2, kMost = 4;
  template <class A>
  VTOK_DEVICE void add(A (&sums)[6], A x, A r, const A (&)[2]) {
    sums[0] = add_rn(sums[0], x);
    sums[1] = add_rn(sums[1], r);
    sums[2] = x > sums[2] ? x : sums[2];
    sums[3] = -x > sums[3] ? -x : sums[3];
    sums[4] = r > sums[4] ? r : sums[4];
    sums[5] = -r > sums[5] ? -r : sums[5];
  }
};
struct CentredRule {  // squares and product about the means of x and r
  static constexpr int kSums = 3, kMost = 0;
  template <class A>
  VTOK_DEVICE void add(A (&sums)[3], A x, A r, const A (&mean)[2]) {
    const A a = x - mean[0], b = r - mean[1];
    sums[0] = add_rn(sums[0], mul_rn(a, a));
    sums[1] = add_rn(sums[1], mul_rn(b, b));
    sums[2] = add_rn(sums[2], mul_rn(a, b));
  }
};
struct MomentRule {  // of integers: x, r, x², r², x·r, and the most of x, -x, r, -r
  static constexpr int kSums = 5, kMost = 4;
  VTOK_DEVICE void add_bytes(unsigned (&sums)[5], unsigned x, unsigned r) {
    sums[0] = __dp4a(x, 0x01010101u, sums[0]);
    sums[1] = __dp4a(r, 0x01010101u, sums[1]);
    sums[2] = __dp4a(x, x, sums[2]);
    sums[3] = __dp4a(r, r, sums[3]);
    sums[4] = __dp4a(x, r, sums[4]);
  }
};

// The sums of a word's columns.
template <class T, class Word, class Rule>
struct PatchLane {
  using A = accumulator_t<T>;
  static constexpr int kPixels = kWordPixels<T, Word>;
  struct alignas(sizeof(Word)) Pixels {
    T at[kPixels];
  };
  A sums[kPixels][Rule::kSums + Rule::kMost];

  VTOK_DEVICE void start(PatchLane& lane) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
      for (int s = 0; s < Rule::kSums + Rule::kMost; ++s)
        lane.sums[i][s] = s < Rule::kSums ? 0 : -static_cast<A>(INFINITY);
  }
  VTOK_DEVICE void add(PatchLane& lane, Word x, Word r, const A (&mean)[2]) {
    const Pixels a = bit_cast<Pixels>(x), b = bit_cast<Pixels>(r);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) Rule::add(lane.sums[i], widen(a.at[i]), widen(b.at[i]), mean);
  }
  VTOK_DEVICE void settle(PatchLane&) {}
  VTOK_DEVICE void finish(PatchLane&) {}
};

// Integers: the bytes that a shorter word lacks are zeros, which matter to a least value alone.
template <class Word, class Rule>
struct PatchLane<uint8_t, Word, Rule> {
  int64_t sums[1][Rule::kSums + Rule::kMost];
  unsigned bytes[Rule::kSums], most[2], least[2];

  VTOK_DEVICE void start(PatchLane& lane) {
    for (int s = 0; s < Rule::kSums + Rule::kMost; ++s) lane.sums[0][s] = 0;
    for (int s = 0; s < Rule::kSums; ++s) lane.bytes[s] = 0;
    for (int i = 0; i < 2; ++i) lane.most[i] = 0, lane.least[i] = kFullMask;
  }
  VTOK_DEVICE void add(PatchLane& lane, Word x, Word r, const float (&)[2]) {
    Rule::add_bytes(lane.bytes, x, r);
    if constexpr (Rule::kMost > 0) {
      lane.most[0] = __vmaxu4(lane.most[0], x), lane.least[0] = __vminu4(lane.least[0], x);
      lane.most[1] = __vmaxu4(lane.most[1], r), lane.least[1] = __vminu4(lane.least[1], r);
    }
  }
  // Before a sum of 32 bits is full.
  VTOK_DEVICE void settle(PatchLane& lane) {
    for (int s = 0; s < Rule::kSums; ++s) lane.sums[0][s] += lane.bytes[s], lane.bytes[s] = 0;
  }
  VTOK_DEVICE void finish(PatchLane& lane) {
    settle(lane);
    if constexpr (Rule::kMost > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int most = 0, least = 255;
        for (int byte = 0; byte < static_cast<int>(sizeof(Word)); ++byte) {
          const int high = lane.most[i] >> 8 * byte & 255, low = lane.least[i] >> 8 * byte & 255;
          most = high > most ? high : most;
          least = low < least ? low : least;
        }
        lane.sums[0][Rule::kSums + 2 * i] = most, lane.sums[0][Rule::kSums + 2 * i + 1] = -least;
      }
    }
  }
};

// Where a block's columns meet: twice, so that one barrier parts writing from reading.
template <class T, class Word, PatchKind kKind>
struct PatchShared {
  static constexpr int kSums = kKind != PatchKind::ssim ? 1 : sizeof(T) == 1 ? 9 : 6;
  patch_sum_t<T> slots[2][kSums][kPatchThreads * kWordSlots<T, Word>];
  accumulator_t<T> mean[2][kKind == PatchKind::ssim ? kPatchThreads : 1];
};

// A batch of rows from a pointer that moves on; those `left` or more beyond it are zeros and not looked at.
template <class T, class Word, int kRows>
VTOK_DEVICE void load_rows(const T*& from, int64_t row, int left, Word (&words)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i, from += row) words[i] = i < left ? *reinterpret_cast<const Word*>(from) : Word{};
}
template <class T, class Word, int kRows>
VTOK_DEVICE void store_rows(T* to, int64_t row, int left, const Word (&words)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i, to += row)
    if (i < left) *reinterpret_cast<Word*>(to) = words[i];
}

// Down the rows of a thread's word. Where `keep` says so, x takes the place of its reference.
template <class T, class Word, class Rule>
VTOK_DEVICE void add_rows(const PatchVideo& video, const PatchStrip& strip, const PatchPixels<T>& x,
                          const PatchPixels<T>& r, bool keep, int64_t column, const accumulator_t<T> (&mean)[2],
                          PatchLane<T, Word, Rule>& lane) {
  const int rows = column < strip.columns ? static_cast<int>(strip.rows) : 0, ph = static_cast<int>(video.ph);
  const int64_t frames = compared_frames(video);
  constexpr int kRows = Rule::kSums + Rule::kMost == 1 ? 2 * kPatchBatch : kPatchBatch;
  int unsettled = 0;
#pragma unroll 1
  for (int64_t channel = 0; channel < video.C; ++channel) {
#pragma unroll 1
    for (int64_t frame = 0; frame < frames; ++frame) {
      const T* from = x.at + channel * x.channel + frame * x.frame + column;
      const T* with = r.at + channel * r.channel + frame * r.frame + column;
#pragma unroll 1
      for (int y = 0; y < ph; y += kRows) {
        Word now[kRows], before[kRows];
        const T* const first = with;
        load_rows(from, x.row, rows - y, now);
        load_rows(with, r.row, rows - y, before);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          if (y + i < ph) PatchLane<T, Word, Rule>::add(lane, now[i], before[i], mean);
        if (keep) store_rows(const_cast<T*>(first), r.row, rows - y, now);
        if ((unsettled += kRows) < kPatchSettled) continue;
        PatchLane<T, Word, Rule>::settle(lane);
        unsettled = 0;
      }
    }
  }
  PatchLane<T, Word, Rule>::finish(lane);
}

// The totals of each patch of a strip, in the thread of its number; the whole block.
template <class Rule, class Word, class T, PatchKind kKind>
VTOK_DEVICE void sum_patches(const PatchVideo& video, const PatchStrip& strip, const PatchPixels<T>& x,
                             const PatchPixels<T>& r, bool keep, PatchShared<T, Word, kKind>& shared, int& buffer,
                             patch_sum_t<T> (&totals)[Rule::kSums + Rule::kMost]) {
  constexpr int kPixels = kWordPixels<T, Word>, kSlots = kWordSlots<T, Word>, kAll = Rule::kSums + Rule::kMost;
  const int64_t width = strip.patches * video.pw;
  const int thread = threadIdx.x;
  for (int64_t from = 0; from < width; from += kPatchThreads * kPixels) {  // one round unless a patch is wider
    const int64_t column = from + thread * kPixels;
    if (column < width) {
      accumulator_t<T> mean[2] = {};
      if constexpr (kKind == PatchKind::ssim)
        for (int s = 0; s < 2; ++s) mean[s] = shared.mean[s][column / video.pw];
      PatchLane<T, Word, Rule> lane;
      PatchLane<T, Word, Rule>::start(lane);
      add_rows(video, strip, x, r, keep, column, mean, lane);
#pragma unroll
      for (int s = 0; s < kAll; ++s)
        for (int i = 0; i < kSlots; ++i) shared.slots[buffer][s][thread * kSlots + i] = lane.sums[i][s];
    }
    __syncthreads();
    if (thread < strip.patches) {
      const int64_t left = width - from < video.pw ? width - from : video.pw;
      const int64_t tile = left < kPatchThreads * kPixels ? left : kPatchThreads * kPixels;
      const int each = static_cast<int>(tile * kSlots / kPixels);
#pragma unroll
      for (int s = 0; s < kAll; ++s) {
        patch_sum_t<T> total = from ? totals[s] : shared.slots[buffer][s][thread * each];
        for (int k = from ? 0 : 1; k < each; ++k) {
          const patch_sum_t<T> column_sum = shared.slots[buffer][s][thread * each + k];
          if (s < Rule::kSums) total = total + column_sum;
          else total = column_sum > total ? column_sum : total;
        }
        totals[s] = total;
      }
    }
    buffer ^= 1;
  }
}

// One step of a strip against its reference: the score of each patch, in the thread of its number; the whole block.
template <class T, class Word, PatchKind kKind>
VTOK_DEVICE accumulator_t<T> score_strip(const PatchVideo& video, const PatchStrip& strip, const PatchPixels<T>& x,
                                         const PatchPixels<T>& r, bool keep, PatchShared<T, Word, kKind>& shared,
                                         int& buffer) {
  using A = accumulator_t<T>;
  const int64_t P = patch_values(video);
  if constexpr (kKind != PatchKind::ssim) {
    using Rule = std::conditional_t<kKind == PatchKind::squares, SquareRule, AbsoluteRule>;
    patch_sum_t<T> total[1] = {};
    sum_patches<Rule>(video, strip, x, r, keep, shared, buffer, total);
    return patch_distance(video.metric, static_cast<A>(total[0]), P);
  } else if constexpr (sizeof(T) == 1) {
    int64_t t[9] = {};
    sum_patches<MomentRule>(video, strip, x, r, keep, shared, buffer, t);
    const int64_t x_spread = t[5] + t[6], r_spread = t[7] + t[8];
    return ssim_of_integers(t[0], t[1], t[2], t[3], t[4], x_spread > r_spread ? x_spread : r_spread, P);
  } else {
    A level[6] = {}, moment[3] = {};
    sum_patches<LevelRule>(video, strip, x, r, false, shared, buffer, level);
    const A mx = div_rn(level[0], static_cast<A>(P)), mr = div_rn(level[1], static_cast<A>(P));
    if (threadIdx.x < strip.patches) shared.mean[0][threadIdx.x] = mx, shared.mean[1][threadIdx.x] = mr;
    __syncthreads();
    sum_patches<CentredRule>(video, strip, x, r, keep, shared, buffer, moment);
    const A x_spread = level[2] + level[3], r_spread = level[4] + level[5];
    return ssim_distance(mx, mr, div_rn(moment[0], static_cast<A>(P)), div_rn(moment[1], static_cast<A>(P)),
                         div_rn(moment[2], static_cast<A>(P)), x_spread > r_spread ? x_spread : r_spread);
  }
}

// --- on the host --------------------------------------------------------------------------------------------------

// Patches of a strip: what the columns of one block hold, or one wider patch.
template <class T, class Word>
int64_t strip_patches(const PatchVideo& video) {
  const int64_t most = kPatchThreads * kWordPixels<T, Word> / video.pw;
  return most < 1 ? 1 : most < video.w ? most : video.w;
}

// Whether every patch begins and ends at a word's boundary.
template <class T, class Word>
bool words_fit(const PatchVideo& video) {
  constexpr int64_t k = kWordPixels<T, Word>;
  const uint64_t address = reinterpret_cast<uint64_t>(video.frames);
  return ((video.pw | video.W | video.batch | video.frame | video.channel | video.row) & (k - 1)) == 0 &&
         address % sizeof(Word) == 0;
}

// Calls body(Word{}, kind) with the widest word that fits.
template <class T, class Body>
cudaError_t dispatch_patches(const PatchVideo& video, const Body& body) {
  const auto with_word = [&](auto word) {
    switch (video.metric) {
      case PatchMetric::l1: return body(word, std::integral_constant<PatchKind, PatchKind::differences>{});
      case PatchMetric::ssim: return body(word, std::integral_constant<PatchKind, PatchKind::ssim>{});
      default: return body(word, std::integral_constant<PatchKind, PatchKind::squares>{});
    }
  };
  if constexpr (sizeof(T) == 8) return with_word(uint64_t{});
  else if constexpr (sizeof(T) == 4) return with_word(uint32_t{});
  else {
    if (words_fit<T, uint32_t>(video)) return with_word(uint32_t{});
    if constexpr (sizeof(T) == 1)
      if (!words_fit<T, uint16_t>(video)) return with_word(uint8_t{});
    return with_word(uint16_t{});
  }
}

}  // namespace vtok
