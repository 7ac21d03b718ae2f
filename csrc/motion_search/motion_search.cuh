// Each patch against the blocks around it in the step before. A warp takes a patch and each of its lanes some of the
// vectors: a lane adds up a whole distance by itself, column by column, so that nothing but the best of the lanes has
// to be found together. The pixels of a few patches side by side, and the window that their blocks lie in, are read
// from memory once and kept in shared memory, 16-bit floats widened.
#pragma once

#include <type_traits>

#include "common/patch.cuh"
#include "motion_search/motion_search.h"

namespace vtok {

constexpr int kSearchPatches = 8;            // warps of a block, at most
constexpr int64_t kSearchStage = 48 * 1024;  // bytes of shared memory, at most

template <class T>
using staged_t = std::conditional_t<sizeof(T) == 1, uint8_t, accumulator_t<T>>;

// What a block keeps of some patches and of the window around them: rows of pixels that begin at a word's boundary and
// end with a word to spare, for bytes are read four at a time.
struct SearchStage {
  int64_t row, window_row;  // values from row to row
  int64_t frame, window_frame;
  int64_t values;
};
template <class T>
VTOK_BOTH SearchStage search_stage(const MotionSearch& search, int64_t patches) {
  const PatchVideo& video = search.video;
  const auto whole = [](int64_t columns) { return sizeof(T) == 1 ? (columns + 3) / 4 * 4 + 4 : columns; };
  SearchStage stage;
  stage.row = whole(patches * video.pw), stage.window_row = whole(patches * video.pw + 2 * search.rx);
  stage.frame = video.ph * stage.row, stage.window_frame = (video.ph + 2 * search.ry) * stage.window_row;
  stage.values = video.C * compared_frames(video) * (stage.frame + stage.window_frame);
  return stage;
}

// Rows x columns pixels of every frame that is compared; those outside the image are zeros. The whole block.
template <class T>
VTOK_DEVICE void stage_pixels(const PatchVideo& video, const PatchPixels<T>& from, int64_t y, int64_t x, int64_t rows,
                              int64_t row, staged_t<T>* to) {
  const int64_t frames = compared_frames(video);
  for (int64_t i = threadIdx.y; i < video.C * frames * rows; i += blockDim.y) {
    const int64_t line = i % rows, plane = i / rows, top = y + line;
    const T* const source = from.at + plane / frames * from.channel + plane % frames * from.frame + line * from.row;
    for (int64_t column = threadIdx.x; column < row; column += kWarp) {
      const bool inside = top >= 0 && top < video.H && x + column >= 0 && x + column < video.W;
      if constexpr (sizeof(T) == 1) to[i * row + column] = inside ? source[column] : 0;
      else to[i * row + column] = inside ? widen(source[column]) : 0;
    }
  }
}

VTOK_DEVICE int64_t add_difference(int64_t sum, uint8_t x, uint8_t r, bool squares) {
  const int d = static_cast<int>(x) - static_cast<int>(r);
  return sum + (squares ? d * d : d < 0 ? -d : d);
}
template <class A, class E>
VTOK_DEVICE A add_difference(A sum, E x, E r, bool squares) {
  const A d = widen(x) - widen(r);
  return add_rn(sum, squares ? mul_rn(d, d) : d < 0 ? -d : d);
}

// The sum of a patch's differences, columns from left to right; columns beyond the image would add zeros.
template <PatchKind kKind, class E>
VTOK_DEVICE patch_sum_t<E> sum_block(const PatchPixels<E>& x, const PatchPixels<E>& r, int64_t C, int64_t frames,
                                     int rows, int columns) {
  patch_sum_t<E> total = 0;
#pragma unroll 1
  for (int k = 0; k < columns; ++k) {
    patch_sum_t<E> column = 0;
#pragma unroll 1
    for (int64_t c = 0; c < C; ++c)
#pragma unroll 1
      for (int64_t frame = 0; frame < frames; ++frame) {
        const E *from = x.at + c * x.channel + frame * x.frame + k, *with = r.at + c * r.channel + frame * r.frame + k;
#pragma unroll 4
        for (int y = 0; y < rows; ++y, from += x.row, with += r.row)
          column = add_difference(column, *from, *with, kKind == PatchKind::squares);
      }
    total = k ? total + column : column;
  }
  return total;
}

VTOK_DEVICE unsigned four_bytes(const unsigned* words, int at) {
  return __funnelshift_r(words[at / 4], words[at / 4 + 1], at % 4 * 8);
}

// The same of staged bytes, `x_at` and `r_at` bytes into rows of words, row by row.
template <PatchKind kKind>
VTOK_DEVICE int64_t sum_bytes(const uint8_t* x, const uint8_t* r, int x_at, int r_at, const SearchStage& stage,
                              int64_t planes, int rows, int columns) {
  int64_t total = 0;
#pragma unroll 1
  for (int64_t plane = 0; plane < planes; ++plane)
#pragma unroll 1
    for (int y = 0; y < rows; ++y) {
      const auto* a = reinterpret_cast<const unsigned*>(x + plane * stage.frame + y * stage.row);
      const auto* b = reinterpret_cast<const unsigned*>(r + plane * stage.window_frame + y * stage.window_row);
      unsigned sum = 0;  // what shared memory holds of a row cannot fill it
#pragma unroll 4
      for (int k = 0; k < columns; k += 4) {
        const unsigned mask = columns - k < 4 ? (1u << (columns - k) * 8) - 1 : kFullMask;
        const unsigned d = __vabsdiffu4(four_bytes(a, x_at + k) & mask, four_bytes(b, r_at + k) & mask);
        sum = __dp4a(d, kKind == PatchKind::squares ? d : 0x01010101u, sum);
      }
      total += sum;
    }
  return total;
}

template <class T, PatchKind kKind, bool kStaged>
__global__ void __launch_bounds__(kSearchPatches* kWarp, kStaged ? 2 : 1) search_kernel(MotionSearch search) {
  using A = accumulator_t<T>;
  VTOK_DYNAMIC_SHARED(memory);
  const PatchVideo& video = search.video;
  const int64_t patches = blockDim.y, blocks = (video.w - 1) / patches + 1;
  int64_t block = blockIdx.x;
  const int64_t first = block % blocks * patches, px = first + threadIdx.y;
  const int64_t py = (block /= blocks) % video.h, t = (block /= video.h) % video.steps, b = block / video.steps;
  const int64_t place = ((b * video.steps + t) * video.h + py) * video.w + px;
  const int64_t top = py * video.ph, left = px * video.pw, planes = video.C * compared_frames(video);
  const int lane = threadIdx.x;
  A* const motion = static_cast<A*>(search.motion) + place;
  if (t == 0) {
    if (lane == 0 && px < video.w)
      *motion = static_cast<A>(INFINITY), search.vectors[2 * place] = search.vectors[2 * place + 1] = 0;
    return;
  }
  const SearchStage stage = search_stage<T>(search, patches);
  auto* const own = reinterpret_cast<staged_t<T>*>(memory);
  staged_t<T>* const window = own + planes * stage.frame;
  if constexpr (kStaged) {
    const int64_t corner = first * video.pw;
    stage_pixels<T>(video, step_pixels<T>(video, b, t, py, first), top, corner, video.ph, stage.row, own);
    PatchPixels<T> around = reference_pixels<T>(video, b, t - 1, py, first);
    around.at -= search.ry * video.row + search.rx;
    stage_pixels<T>(video, around, top - search.ry, corner - search.rx, video.ph + 2 * search.ry, stage.window_row,
                    window);
    __syncthreads();
  }
  if (px >= video.w) return;
  const int rows = static_cast<int>(video.H - top < video.ph ? video.H - top : video.ph);
  const int columns = static_cast<int>(video.W - left < video.pw ? video.W - left : video.pw);
  const int64_t frames = compared_frames(video), P = patch_values(video);
  const auto cost = [&](int64_t dy, int64_t dx) {
    if constexpr (kStaged && sizeof(T) == 1) {
      const int64_t sum =
          sum_bytes<kKind>(own, window + (search.ry + dy) * stage.window_row, static_cast<int>(left - first * video.pw),
                           static_cast<int>(left - first * video.pw + search.rx + dx), stage, planes, rows, columns);
      return patch_distance(video.metric, static_cast<A>(sum), P);
    } else if constexpr (kStaged) {
      const int64_t at = left - first * video.pw;
      const PatchPixels<A> x{own + at, stage.frame, frames * stage.frame, stage.row};
      const PatchPixels<A> r{window + (search.ry + dy) * stage.window_row + at + search.rx + dx, stage.window_frame,
                             frames * stage.window_frame, stage.window_row};
      return patch_distance(video.metric, sum_block<kKind>(x, r, video.C, frames, rows, columns), P);
    } else {
      const PatchPixels<T> x = step_pixels<T>(video, b, t, py, px);
      PatchPixels<T> r = reference_pixels<T>(video, b, t - 1, py, px);
      r.at += dy * video.row + dx;
      return patch_distance(video.metric, static_cast<A>(sum_block<kKind>(x, r, video.C, frames, rows, columns)), P);
    }
  };

  const A still = cost(0, 0), bias = static_cast<A>(search.bias);
  A best = static_cast<A>(NAN);
  const int64_t wide = 2 * search.rx + 1, vectors = (2 * search.ry + 1) * wide;
  int64_t rank = vectors * (search.ry + search.rx + 1);  // of the best vector; a lower one is preferred
  for (int64_t i = still <= bias ? vectors : lane; i < vectors; i += kWarp) {
    const int64_t dy = i / wide - search.ry, dx = i % wide - search.rx;
    const int64_t own_rank = ((dy < 0 ? -dy : dy) + (dx < 0 ? -dx : dx)) * vectors + i;
    if (own_rank < vectors || !stays_inside(top, rows, video.H, dy) || !stays_inside(left, columns, video.W, dx))
      continue;
    const A now = cost(dy, dx);
    if (costs_less(now, best) || (now == best && own_rank < rank)) best = now, rank = own_rank;
  }
#pragma unroll
  for (int with = kWarp / 2; with > 0; with /= 2) {
    const A other = __shfl_xor_sync(kFullMask, best, with);
    const int64_t other_rank = __shfl_xor_sync(kFullMask, rank, with);
    if (costs_less(other, best) || (other == best && other_rank < rank)) best = other, rank = other_rank;
  }
  if (lane > 0) return;
  const bool moved = moves(best, still, bias);
  *motion = moved ? best : still;
  search.vectors[2 * place] = moved ? rank % vectors / wide - search.ry : 0;
  search.vectors[2 * place + 1] = moved ? rank % vectors % wide - search.rx : 0;
}

template <class T, PatchKind kKind>
cudaError_t search_with(const MotionSearch& search, cudaStream_t stream) {
  const PatchVideo& video = search.video;
  const auto bytes = [&](int64_t patches) {
    return search_stage<T>(search, patches).values * static_cast<int64_t>(sizeof(staged_t<T>));
  };
  int64_t patches = kSearchPatches;
  while (patches > 1 && (patches / 2 >= video.w || bytes(patches) > kSearchStage)) patches /= 2;
  const bool staged = bytes(patches) <= kSearchStage;
  if (!staged) patches = kSearchPatches;
  const dim3 grid(ceil_div(video.w, patches) * video.h * video.steps * video.videos), block(kWarp, patches);
  return staged ? VTOK_LAUNCH((search_kernel<T, kKind, true>), grid, block, bytes(patches), stream, search)
                : VTOK_LAUNCH((search_kernel<T, kKind, false>), grid, block, 0, stream, search);
}

template <class T>
cudaError_t motion_search_launch(const MotionSearch& search, cudaStream_t stream) {
  if (search.video.videos * search.video.steps == 0) return cudaSuccess;
  return search.video.metric == PatchMetric::l1 ? search_with<T, PatchKind::differences>(search, stream)
                                                : search_with<T, PatchKind::squares>(search, stream);
}

// The same from pointers and numbers.
template <class T>
cudaError_t motion_search_call(const T* frames, int64_t batch, int64_t frame, int64_t channel, int64_t row,
                               int64_t videos, int64_t steps, int64_t C, int64_t H, int64_t W, int64_t tubelet,
                               int64_t ph, int64_t pw, bool whole, int metric, int64_t ry, int64_t rx, double bias,
                               accumulator_t<T>* motion, int64_t* vectors, cudaStream_t stream) {
  const PatchVideo video{frames,
                         batch,
                         frame,
                         channel,
                         row,
                         videos,
                         steps,
                         C,
                         H,
                         W,
                         tubelet,
                         ph,
                         pw,
                         ceil_div(H, ph),
                         ceil_div(W, pw),
                         whole,
                         static_cast<PatchMetric>(metric)};
  return motion_search_launch<T>({video, ry, rx, bias, motion, vectors}, stream);
}

VTOK_HOST_EXPORT("motion_search_uint8", motion_search_call<uint8_t>)
VTOK_HOST_EXPORT("motion_search_float32", motion_search_call<float>)
VTOK_HOST_EXPORT("motion_search_float16", motion_search_call<f16>)
VTOK_HOST_EXPORT("motion_search_bfloat16", motion_search_call<bf16>)
VTOK_HOST_EXPORT("motion_search_float64", motion_search_call<double>)

}  // namespace vtok
