// Where patches lie in frames [B, T, C, H, W], for the CPU's kernels and CUDA's alike.
#pragma once

#include "common/half.h"

namespace vtok {

constexpr int64_t kPatchifyChannels = 128;  // the most with a mean or std: they travel with the launch

VTOK_BOTH float widen(uint8_t x) { return x; }

struct PatchGrid {
  int64_t channels, height, width;
  int64_t batch, steps, high, wide;  // sites are numbered in this order
  int64_t tubelet, patch_h, patch_w;
  int64_t stride[5];  // values between neighbours in b, t, c, y, x
};

// sizes and strides of the frames.
VTOK_BOTH PatchGrid patch_grid(const int64_t* sizes, const int64_t* strides, int64_t patch_h, int64_t patch_w,
                               int64_t tubelet) {
  return PatchGrid{sizes[2],
                   sizes[3],
                   sizes[4],
                   sizes[0],
                   sizes[1] / tubelet,
                   (sizes[3] + patch_h - 1) / patch_h,
                   (sizes[4] + patch_w - 1) / patch_w,
                   tubelet,
                   patch_h,
                   patch_w,
                   {strides[0], strides[1], strides[2], strides[3], strides[4]}};
}

VTOK_BOTH int64_t patch_sites(const PatchGrid& g) { return g.batch * g.steps * g.high * g.wide; }
VTOK_BOTH int64_t patch_values(const PatchGrid& g) { return g.channels * g.tubelet * g.patch_h * g.patch_w; }

// Takes the last digit off a mixed-radix number; in 32 bits where they do, which is several times faster.
VTOK_BOTH int64_t last_digit(int64_t& number, int64_t radix) {
  if (((number | radix) >> 32) == 0) {
    const uint32_t n = static_cast<uint32_t>(number), r = static_cast<uint32_t>(radix), rest = n / r;
    number = rest;
    return n - rest * r;
  }
  const int64_t digit = number % radix;
  number /= radix;
  return digit;
}

struct PatchPlace {
  int64_t offset;      // of the first value
  int64_t high, wide;  // rows and columns from there to the frame's lower and right edge
};

VTOK_BOTH PatchPlace patch_place(const PatchGrid& g, int64_t site) {
  const int64_t x = last_digit(site, g.wide) * g.patch_w, y = last_digit(site, g.high) * g.patch_h;
  const int64_t t = last_digit(site, g.steps) * g.tubelet;
  return {site * g.stride[0] + t * g.stride[1] + y * g.stride[3] + x * g.stride[4], g.height - y, g.width - x};
}

// The block that lies (dy, dx) from there; so far away as to be outside the frame is far enough.
VTOK_BOTH PatchPlace patch_moved(const PatchGrid& g, const PatchPlace& place, const int64_t* vector) {
  const auto within = [](int64_t x, int64_t most) { return x < -most ? -most : x > most ? most : x; };
  const int64_t dy = within(vector[0], g.height + g.patch_h), dx = within(vector[1], g.width + g.patch_w);
  return {place.offset + dy * g.stride[3] + dx * g.stride[4], place.high - dy, place.wide - dx};
}

// Whether a pixel of a patch lies in the frame, and whether all of them do.
VTOK_BOTH bool patch_has(const PatchGrid& g, const PatchPlace& place, int64_t y, int64_t x) {
  return y < place.high && x < place.wide && y >= place.high - g.height && x >= place.wide - g.width;
}
VTOK_BOTH bool patch_whole(const PatchGrid& g, const PatchPlace& place) {
  return patch_has(g, place, 0, 0) && patch_has(g, place, g.patch_h - 1, g.patch_w - 1);
}

}  // namespace vtok
