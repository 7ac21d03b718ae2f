// The score of a row and who is denser, for the CPU's kernels and CUDA's alike. The logarithm is spelled out, so that
// it has the same bits everywhere.
#pragma once

#include "common/half.h"

namespace vtok {

constexpr int kMostNeighbours = 64;

VTOK_BOTH float infinite() { return bit_cast<float>(0x7f800000u); }

// ln x of a positive number: 2·artanh((m - 1) / (m + 1)) of its mantissa m in [√½, √2).
VTOK_BOTH float cluster_log(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float mantissa = bit_cast<float>(bits - (static_cast<uint32_t>(exponent) << 23));
  const float s = (mantissa - 1.0f) / (mantissa + 1.0f), w = s * s;
  float series = w * static_cast<float>(1.0 / 9) + static_cast<float>(1.0 / 7);
  series = series * w + static_cast<float>(1.0 / 5);
  series = series * w + static_cast<float>(1.0 / 3);
  series = series * w + 1.0f;
  return static_cast<float>(exponent) * 0.693147180559945309f + (s + s) * series;
}

// ln(ρ·δ) = ln δ - m: of m, and of the squared distance to the nearest denser row, D times too large.
VTOK_BOTH float cluster_score(float mean, float nearest, int64_t D) {
  const float x = nearest / static_cast<float>(D > 1 ? D : 1);
  const float delta = x == 0 ? -infinite() : x == infinite() ? x : cluster_log(x) * 0.5f;
  return delta - mean;
}

// The mean of the least squared distances, from their sum.
VTOK_BOTH float cluster_mean(float sum, int64_t neighbours, int64_t D) {
  return sum / static_cast<float>(neighbours * (D > 1 ? D : 1));
}

VTOK_BOTH bool denser(float mean_a, int64_t a, float mean_b, int64_t b) {
  return mean_a < mean_b || (mean_a == mean_b && a < b);
}

}  // namespace vtok
