// Gathers patches: a warp per output row, 16 bytes of it a lane and step where the row's width allows. A place in a row
// is a number of four digits; a lane takes it apart once a step and counts on from there.
#pragma once

#include <type_traits>

#include "common/kernel.h"
#include "patchify/patchify.h"

namespace vtok {

constexpr int kPatchifyWarps = 8;

template <class In, class Out>
struct PatchifyKernelArgs {
  using A = accumulator_t<In>;
  const In* frames;
  PatchGrid grid;
  const int64_t *index, *reference, *vectors;  // [count], [count] or null, [count, 2] or null
  int64_t count;
  Out* out;  // [count, patch_values(grid)]
  bool per_channel, channels_last;
  int radix[4];                                          // of the digits of a place, (c, t, y, x) or (t, y, x, c)
  int64_t stride[4], wrap[4];                            // what a digit is worth in the frames, and its radix
  A scale[kPatchifyChannels], shift[kPatchifyChannels];  // one of each channel, or one of all
};

struct PatchifyPlace {
  int digit[4];
  int64_t step;  // from the patch's first value
};

template <class Args>
VTOK_DEVICE PatchifyPlace patchify_at(const Args& args, int64_t column) {
  PatchifyPlace place;
  place.step = 0;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    place.digit[d] = static_cast<int>(last_digit(column, args.radix[d]));
    place.step += place.digit[d] * args.stride[d];
  }
  return place;
}

// Counts on by one, without a branch: neighbours in a warp carry at different times.
template <class Args>
VTOK_DEVICE void patchify_advance(const Args& args, PatchifyPlace& place) {
  bool carry = true;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    place.digit[d] += carry;
    place.step += carry ? args.stride[d] : 0;
    carry = place.digit[d] == args.radix[d];
    place.digit[d] = carry ? 0 : place.digit[d];
    place.step -= carry ? args.wrap[d] : 0;
  }
}

template <class A>
VTOK_DEVICE A patchify_normal(A x, A scale, A shift) {
  return add_rn(mul_rn(x, scale), -shift);
}

// What a warp knows of its row.
template <class In>
struct PatchifyRow {
  const In *own, *reference;  // the first values of the two patches; null without one
  PatchPlace place, other;
  bool whole;  // both within the frame, and wide words where words begin
};

template <class In, class Out>
VTOK_DEVICE accumulator_t<In> patchify_value(const PatchifyKernelArgs<In, Out>& args, const PatchifyRow<In>& row,
                                             const PatchifyPlace& at) {
  using A = accumulator_t<In>;
  const int c = !args.per_channel ? 0 : args.channels_last ? at.digit[3] : at.digit[0];
  const A scale = args.scale[c], shift = args.shift[c];
  bool inside = true, seen = row.reference != nullptr;
  if (!row.whole) {
    const int y = args.channels_last ? at.digit[1] : at.digit[2], x = args.channels_last ? at.digit[2] : at.digit[3];
    inside = patch_has(args.grid, row.place, y, x);
    seen = seen && patch_has(args.grid, row.other, y, x);
  }
  const A own = inside ? widen(row.own[at.step]) : A{0}, reference = seen ? widen(row.reference[at.step]) : A{0};
  if (inside && seen) return mul_rn(add_rn(own, -reference), scale);
  if (inside) return patchify_normal(own, scale, shift);
  return seen ? add_rn(A{0}, -patchify_normal(reference, scale, shift)) : A{0};
}

struct Word32 {
  Word16 half[2];
};
template <int kBytes>
using PatchifyWord = std::conditional_t<
    kBytes == 32, Word32,
    std::conditional_t<kBytes == 16, Word16,
                       std::conditional_t<kBytes == 8, uint64_t,
                                          std::conditional_t<kBytes == 4, uint32_t,
                                                             std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>>;
template <class T, int N>
struct PatchifyValues {
  T v[N];
};

template <class In, int N>
VTOK_DEVICE PatchifyValues<In, N> patchify_load(const In* from) {
  return bit_cast<PatchifyValues<In, N>>(*reinterpret_cast<const PatchifyWord<N * sizeof(In)>*>(from));
}

// Where a word of N values may begin, in bytes.
template <class In, int N>
constexpr int64_t kPatchifyAlign = N * sizeof(In) < 16 ? N * sizeof(In) : 16;

// N values a lane and step; kWide: they lie side by side in the frames and are read as one word.
template <class In, class Out, int N, bool kWide>
__global__ void __launch_bounds__(kPatchifyWarps* kWarp) patchify_kernel(PatchifyKernelArgs<In, Out> args) {
  using A = accumulator_t<In>;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kPatchifyWarps + threadIdx.y;
  if (k >= args.count) return;
  const int64_t sites = patch_sites(args.grid), width = patch_values(args.grid);
  const auto valid = [&](int64_t site) { return site >= 0 && site < sites; };
  const int64_t site = args.index[k], other = args.reference ? args.reference[k] : -1;
  PatchifyRow<In> row{nullptr, nullptr, {0, 0, 0}, {0, 0, 0}, true};
  if (valid(site)) {
    row.place = row.other = patch_place(args.grid, site);
    row.own = args.frames + row.place.offset;
    if (valid(other)) {
      row.other = patch_place(args.grid, other);
      if (args.vectors) row.other = patch_moved(args.grid, row.other, args.vectors + 2 * k);
      row.reference = args.frames + row.other.offset;
    }
    const bool aligned = !kWide || row.other.offset * static_cast<int64_t>(sizeof(In)) % kPatchifyAlign<In, N> == 0;
    row.whole = patch_whole(args.grid, row.place) && patch_whole(args.grid, row.other) && aligned;
  }
  Out* const out = args.out + k * width;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < width; column += kWarp * N) {
    PatchifyValues<Out, N> values{};
    if (row.own) {
      PatchifyPlace at = patchify_at(args, column);
      if (kWide && row.whole) {
        const int c = args.per_channel ? at.digit[0] : 0;
        const A scale = args.scale[c], shift = args.shift[c];
        const auto own = patchify_load<In, N>(row.own + at.step);
        const auto reference = row.reference ? patchify_load<In, N>(row.reference + at.step) : own;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const A x = widen(own.v[n]);
          values.v[n] = round_to(
              row.reference ? mul_rn(add_rn(x, -A{widen(reference.v[n])}), scale) : patchify_normal(x, scale, shift),
              Out{});
        }
      } else {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          values.v[n] = round_to(patchify_value(args, row, at), Out{});
          patchify_advance(args, at);
        }
      }
    }
    using Word = PatchifyWord<N * sizeof(Out)>;
    store_word(reinterpret_cast<Word*>(out + column), bit_cast<Word>(values));
  }
}

template <class In, class Out, int N, bool kWide>
cudaError_t patchify_words(const PatchifyKernelArgs<In, Out>& args, cudaStream_t stream) {
  return VTOK_LAUNCH((patchify_kernel<In, Out, N, kWide>), dim3(ceil_div(args.count, kPatchifyWarps)),
                     dim3(kWarp, kPatchifyWarps), 0, stream, args);
}

// Can N pixels be read as one word wherever a step begins?
template <class In>
bool patchify_wide(const In* frames, const PatchGrid& grid, int64_t values) {
  const uint64_t word = values * sizeof(In) < 16 ? values * sizeof(In) : 16;
  uint64_t places = reinterpret_cast<uint64_t>(frames);
  for (int d = 0; d < 4; ++d) places |= static_cast<uint64_t>(grid.stride[d]) * sizeof(In);
  return grid.stride[4] == 1 && grid.patch_w % values == 0 && places % word == 0;
}

// index, reference and vectors (or null) and out are on the device, grid, scale and shift on the host. count and
// patch_values(*grid) > 0, and the latter below 2^31.
template <class In, class Out>
cudaError_t patchify_launch(const In* frames, const PatchGrid* grid, const int64_t* index, const int64_t* reference,
                            const int64_t* vectors, int64_t count, const double* scale, const double* shift,
                            bool per_channel, bool channels_last, Out* out, cudaStream_t stream) {
  PatchifyKernelArgs<In, Out> args{};
  args.frames = frames;
  args.grid = *grid;
  args.index = index;
  args.reference = reference;
  args.vectors = vectors;
  args.count = count;
  args.out = out;
  args.per_channel = per_channel;
  args.channels_last = channels_last;
  const int64_t radix[4] = {grid->channels, grid->tubelet, grid->patch_h, grid->patch_w};
  const int64_t stride[4] = {grid->stride[2], grid->stride[1], grid->stride[3], grid->stride[4]};
  for (int d = 0; d < 4; ++d) {
    args.radix[d] = static_cast<int>(radix[channels_last ? (d + 1) % 4 : d]);
    args.stride[d] = stride[channels_last ? (d + 1) % 4 : d];
    args.wrap[d] = args.radix[d] * args.stride[d];
  }
  for (int64_t c = 0; c < (per_channel ? grid->channels : 1); ++c) {
    args.scale[c] = static_cast<accumulator_t<In>>(scale[c]);
    args.shift[c] = static_cast<accumulator_t<In>>(shift[c]);
  }
  constexpr int kMost = sizeof(Out) == 8 ? 1 : 16 / sizeof(Out);
  const int64_t width = patch_values(*grid);
  if constexpr (kMost > 1)
    if (width % kMost == 0)
      return !channels_last && patchify_wide(frames, *grid, kMost)
                 ? patchify_words<In, Out, kMost, true>(args, stream)
                 : patchify_words<In, Out, kMost, false>(args, stream);
  if constexpr (kMost == 8)
    if (width % 4 == 0) return patchify_words<In, Out, 4, false>(args, stream);
  return patchify_words<In, Out, 1, false>(args, stream);
}

VTOK_HOST_EXPORT("patchify_uint8_float32", (patchify_launch<uint8_t, float>))
VTOK_HOST_EXPORT("patchify_uint8_float16", (patchify_launch<uint8_t, f16>))
VTOK_HOST_EXPORT("patchify_uint8_bfloat16", (patchify_launch<uint8_t, bf16>))
VTOK_HOST_EXPORT("patchify_float32_float32", (patchify_launch<float, float>))
VTOK_HOST_EXPORT("patchify_float32_float16", (patchify_launch<float, f16>))
VTOK_HOST_EXPORT("patchify_float32_bfloat16", (patchify_launch<float, bf16>))
VTOK_HOST_EXPORT("patchify_float16_float32", (patchify_launch<f16, float>))
VTOK_HOST_EXPORT("patchify_float16_float16", (patchify_launch<f16, f16>))
VTOK_HOST_EXPORT("patchify_float16_bfloat16", (patchify_launch<f16, bf16>))
VTOK_HOST_EXPORT("patchify_bfloat16_float32", (patchify_launch<bf16, float>))
VTOK_HOST_EXPORT("patchify_bfloat16_float16", (patchify_launch<bf16, f16>))
VTOK_HOST_EXPORT("patchify_bfloat16_bfloat16", (patchify_launch<bf16, bf16>))
VTOK_HOST_EXPORT("patchify_float64_float64", (patchify_launch<double, double>))

}  // namespace vtok
