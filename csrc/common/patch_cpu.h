// The distances of patches on the CPU. Integers go down the rows of a block of columns with their sums in registers;
// floats go along the rows of a tile, as they lie in memory, with their sums beside. Columns of a tile are then added
// patch by patch.
#pragma once

#include <type_traits>

#include "common/patch.h"
#include "common/patch_terms.h"

namespace vtok {
namespace {

constexpr int64_t kPatchTile = 512;  // columns side by side; a wider patch is taken in several tiles
constexpr int64_t kPatchRows = 128;  // rows of uint8 whose sums stay in lanes of 16 bits (32 for squares)

// One step of a strip, its reference, and how far from their pixels those lie that are needed soon (0: nowhere).
template <class T>
struct PatchPair {
  const PatchVideo& video;
  PatchStrip strip;
  PatchPixels<T> x, r;
  int64_t x_ahead, r_ahead;
};

// The sums of columns of pixels.
template <class T, class Terms>
struct PatchColumns {
  using Sum = patch_sum_t<T>;
  using V = typename Terms::V;
  static constexpr bool kIntegers = sizeof(Sum) > sizeof(V{}[0]), kPairs = std::is_same_v<T, bf16>;
  static constexpr int kAll = Terms::kSums + Terms::kMost;
  static constexpr int kLane = sizeof(V) / sizeof(V{}[0]), kBlock = 2 * kLane;
  // Pixels of two bytes are bound by arithmetic: their sums are taken every other row and lie on cache lines. Both slow
  // the larger ones down, which are bound by memory.
  static constexpr int kRows = sizeof(T) == 2 ? 2 : 1;
  alignas(sizeof(T) == 2 ? 64 : sizeof(Sum)) Sum sums[kAll][kPatchTile + kBlock];
  Sum mean[2][Terms::kCentred ? kPatchTile + kBlock : 1];  // of x and of r

  // `width` columns from column `from` of the strip on. Floats go along the rows, in the order of the memory.
  inline void add(const PatchPair<T>& pair, int64_t from, int64_t width) {
    if constexpr (kIntegers) {
      for (int64_t slot = 0; slot < width; slot += kBlock) add_block(pair, from + slot, slot);
    } else {
      if constexpr (kPairs && Terms::kCentred) each_block(mean, width, [](Sum* at) { split_pairs(at, kAllLanes); });
      add_along(pair, from, width);
      if constexpr (kPairs) each_block(sums, width, [](Sum* at) { join_pairs(at, kAllLanes); });
    }
  }

 private:
  inline void add_along(const PatchPair<T>& pair, int64_t from, int64_t width) {
    const PatchVideo& video = pair.video;
    const int64_t frames = compared_frames(video), rows = pair.strip.rows, left = pair.strip.columns - from;
    int64_t whole = 0;  // columns of the blocks that the image's edge does not cut
    while (whole < width && whole + kBlock <= left) whole += kBlock;
    fill(width);
    for (int64_t channel = 0; channel < video.C; ++channel)
      for (int64_t frame = 0; frame < frames; ++frame) {
        const T* x = pair.x.at + channel * pair.x.channel + frame * pair.x.frame + from;
        const T* r = pair.r.at + channel * pair.r.channel + frame * pair.r.frame + from;
        for (int64_t slot = whole; slot < width; slot += kBlock)
          change(slot, [&](V(&lanes)[2][kAll], const V(&mean)[2][2]) {
            add_cut_rows(pair, x + slot, r + slot, rows, left - slot, lanes, mean);
          });
        int64_t y = 0;
        for (; y + kRows <= rows; y += kRows) add_across<kRows>(pair, x + y * pair.x.row, r + y * pair.r.row, whole);
        for (; y < rows; ++y) add_across<1>(pair, x + y * pair.x.row, r + y * pair.r.row, whole);
        for (int64_t slot = 0; rows < video.ph && slot < width; slot += kBlock)
          change(slot, [&](V(&lanes)[2][kAll], const V(&mean)[2][2]) {
            for (int64_t y = rows; y < video.ph; ++y) add_zeros(lanes, mean);
          });
      }
  }

  // kRows rows at once.
  template <int kRows>
  inline void add_across(const PatchPair<T>& pair, const T* x, const T* r, int64_t width) {
    const int64_t x_row = pair.x.row, r_row = pair.r.row, x_ahead = pair.x_ahead, r_ahead = pair.r_ahead;
    for (int64_t slot = 0; slot < width; slot += kBlock, x += kBlock, r += kBlock)
      change(slot, [&](V(&lanes)[2][kAll], const V(&mean)[2][2]) {
#pragma GCC unroll 2
        for (int y = 0; y < kRows; ++y) add_row(x + y * x_row, r + y * r_row, x_ahead, r_ahead, lanes, mean);
      });
  }

  // Of each column before its first pixel.
  inline void fill(int64_t width) {
    V lanes[2][kAll];
    start(lanes);
    for (int64_t slot = 0; slot < width; slot += kBlock) keep(lanes, slot);
  }

  // Takes the sums of a block, with the means of its columns, and keeps what becomes of them.
  template <class Change>
  inline void change(int64_t slot, const Change& apply) {
    V lanes[2][kAll], around[2][2] = {};
    for (int v = 0; v < 2; ++v) {
      for (int s = 0; s < kAll; ++s) widen_to(sums[s] + slot + v * kLane, lanes[v][s]);
      if constexpr (Terms::kCentred)
        for (int s = 0; s < 2; ++s) widen_to(mean[s] + slot + v * kLane, around[v][s]);
    }
    apply(lanes, around);
    keep(lanes, slot);
  }
  inline void keep(const V (&lanes)[2][kAll], int64_t slot) {
    for (int v = 0; v < 2; ++v)
      for (int s = 0; s < kAll; ++s) *reinterpret_cast<V*>(sums[s] + slot + v * kLane) = lanes[v][s];
  }

  template <int kCount, int kWidth, class Apply>
  static inline void each_block(Sum (&rows)[kCount][kWidth], int64_t width, const Apply& apply) {
    for (int s = 0; s < kCount; ++s)
      for (int64_t slot = 0; slot < width; slot += kBlock) apply(rows[s] + slot);
  }

  inline void add_block(const PatchPair<T>& pair, int64_t column, int64_t slot) {
    V lanes[2][kAll];
    const V mean[2][2] = {};
    start(lanes);
    const PatchVideo& video = pair.video;
    const int64_t frames = compared_frames(video), left = pair.strip.columns - column;
    int64_t room = kPatchRows;
    bool first = true;
    for (int64_t channel = 0; channel < video.C; ++channel)
      for (int64_t frame = 0; frame < frames; ++frame) {
        const T* x = pair.x.at + channel * pair.x.channel + frame * pair.x.frame + column;
        const T* r = pair.r.at + channel * pair.r.channel + frame * pair.r.frame + column;
        for (int64_t y = 0; y < pair.strip.rows;) {
          const int64_t rows = pair.strip.rows - y < room ? pair.strip.rows - y : room;
          add_rows(pair, x + y * pair.x.row, r + y * pair.r.row, rows, left, lanes, mean);
          y += rows;
          if (room -= rows) continue;
          flush(lanes, slot, first);
          start(lanes);
          room = kPatchRows, first = false;
        }
        for (int64_t y = pair.strip.rows; y < video.ph; ++y) add_zeros(lanes, mean);
      }
    flush(lanes, slot, first);
  }

  static inline void add_rows(const PatchPair<T>& pair, const T* x, const T* r, int64_t rows, int64_t left,
                              V (&lanes)[2][kAll], const V (&mean)[2][2]) {
    if (left < kBlock) return add_cut_rows(pair, x, r, rows, left, lanes, mean);
    for (int64_t y = 0; y < rows; ++y, x += pair.x.row, r += pair.r.row)
      add_row(x, r, pair.x_ahead, pair.r_ahead, lanes, mean);
  }

  // Of a block that the image's edge cuts; zeros fill it up.
  static inline void add_cut_rows(const PatchPair<T>& pair, const T* x, const T* r, int64_t rows, int64_t left,
                                  V (&lanes)[2][kAll], const V (&mean)[2][2]) {
    T whole_x[kBlock] = {}, whole_r[kBlock] = {};
    left = left < 0 ? 0 : left;
    for (int64_t y = 0; y < rows; ++y, x += pair.x.row, r += pair.r.row) {
      __builtin_memcpy(whole_x, x, left * sizeof(T));
      __builtin_memcpy(whole_r, r, left * sizeof(T));
      add_row(whole_x, whole_r, 0, 0, lanes, mean);
    }
  }

  static inline void add_row(const T* x, const T* r, int64_t x_ahead, int64_t r_ahead, V (&lanes)[2][kAll],
                             const V (&mean)[2][2]) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if (v * kLane * sizeof(T) % 64 == 0) {
        __builtin_prefetch(x + x_ahead + v * kLane, 0, 2);
        if (r_ahead) __builtin_prefetch(r + r_ahead + v * kLane, 0, 2);
      }
      V a, b;
      widen_half(x, v, a);
      widen_half(r, v, b);
      Terms::add(lanes[v], a, b, mean[v]);
    }
  }

  // Of a row beyond the image's edge.
  static inline void add_zeros(V (&lanes)[2][kAll], const V (&mean)[2][2]) {
    for (int v = 0; v < 2; ++v) Terms::add(lanes[v], V{}, V{}, mean[v]);
  }

  static inline void start(V (&lanes)[2][kAll]) {
    for (int v = 0; v < 2; ++v)
      for (int s = 0; s < kAll; ++s) lanes[v][s] = s < Terms::kSums ? V{} : V{} + PatchSums<T>::kLeast;
  }

  inline void flush(const V (&lanes)[2][kAll], int64_t slot, bool first) {
    for (int s = 0; s < kAll; ++s)
      for (int v = 0; v < 2; ++v) {
        Sum* const to = sums[s] + slot + v * kLane;
        for (int i = 0; i < kLane; ++i) {
          const Sum lane = lanes[v][s][i];
          if (first) to[i] = lane;
          else if (s < Terms::kSums) to[i] = to[i] + lane;
          else to[i] = lane > to[i] ? lane : to[i];
        }
      }
  }
};

// Patches [first, first + count) of a strip, count * pw <= kPatchTile or count = 1: their columns from left to right.
template <class T, class Terms>
void sum_patches(const PatchPair<T>& pair, int64_t first, int64_t count, const patch_sum_t<T> (*mean)[kPatchTile],
                 patch_sum_t<T> (&totals)[Terms::kSums + Terms::kMost][kPatchTile]) {
  using Sum = patch_sum_t<T>;
  const int64_t pw = pair.video.pw;
  PatchColumns<T, Terms> columns;
  for (int64_t from = 0; from < count * pw; from += kPatchTile) {
    const int64_t width = count * pw - from < kPatchTile ? count * pw - from : kPatchTile;
    const int64_t each = width < pw ? width : pw;  // columns of a patch in this tile
    if constexpr (Terms::kCentred)
      for (int s = 0; s < 2; ++s)
        for (int64_t p = 0; p < count; ++p)
          for (int64_t k = 0; k < each; ++k) columns.mean[s][p * pw + k] = mean[s][p];
    columns.add(pair, first * pw + from, width);
    for (int s = 0; s < Terms::kSums + Terms::kMost; ++s)
      for (int64_t p = 0; p < count; ++p) {
        const Sum* const column = columns.sums[s] + p * pw;
        Sum total = from ? totals[s][p] : column[0];
        for (int64_t k = from ? 0 : 1; k < each; ++k) {
          if (s < Terms::kSums) total = total + column[k];
          else total = column[k] > total ? column[k] : total;
        }
        totals[s][p] = total;
      }
  }
}

template <class T, class Terms, class Score>
void score_differences(const PatchPair<T>& pair, int64_t first, int64_t count, Score* scores) {
  patch_sum_t<T> totals[1][kPatchTile];
  sum_patches<T, Terms>(pair, first, count, nullptr, totals);
  for (int64_t p = 0; p < count; ++p)
    scores[p] = patch_distance(pair.video.metric, static_cast<Score>(totals[0][p]), patch_values(pair.video));
}

void score_ssim(const PatchPair<uint8_t>& pair, int64_t first, int64_t count, float* scores) {
  int64_t t[9][kPatchTile];
  sum_patches<uint8_t, MomentTerms<uint8_t>>(pair, first, count, nullptr, t);
  for (int64_t p = 0; p < count; ++p) {
    const int64_t x = t[5][p] + t[6][p], r = t[7][p] + t[8][p];
    scores[p] = ssim_of_integers(t[0][p], t[1][p], t[2][p], t[3][p], t[4][p], x > r ? x : r, patch_values(pair.video));
  }
}

// Means first, then moments around them, while the pixels are in the cache.
template <class T, class A>
void score_ssim(const PatchPair<T>& pair, int64_t first, int64_t count, A* scores) {
  const A P = static_cast<A>(patch_values(pair.video));
  A level[6][kPatchTile], moment[3][kPatchTile];
  sum_patches<T, LevelTerms<T>>(pair, first, count, nullptr, level);
  for (int s = 0; s < 2; ++s)
    for (int64_t p = 0; p < count; ++p) level[s][p] = level[s][p] / P;
  sum_patches<T, CentredTerms<T>>(pair, first, count, level, moment);
  for (int64_t p = 0; p < count; ++p) {
    const A x = level[2][p] + level[3][p], r = level[4][p] + level[5][p];
    scores[p] =
        ssim_distance(level[0][p], level[1][p], moment[0][p] / P, moment[1][p] / P, moment[2][p] / P, x > r ? x : r);
  }
}

// One step of a strip against its reference.
template <class T, class Score>
void score_strip(const PatchPair<T>& pair, Score* scores) {
  const int64_t most = pair.video.pw < kPatchTile ? kPatchTile / pair.video.pw : 1;
  for (int64_t first = 0; first < pair.strip.patches; first += most) {
    const int64_t left = pair.strip.patches - first, count = left < most ? left : most;
    switch (pair.video.metric) {
      case PatchMetric::l1: score_differences<T, AbsoluteTerms<T>>(pair, first, count, scores + first); break;
      case PatchMetric::ssim: score_ssim(pair, first, count, scores + first); break;
      default: score_differences<T, SquareTerms<T>>(pair, first, count, scores + first);
    }
  }
}

}  // namespace
}  // namespace vtok
