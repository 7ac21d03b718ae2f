// Copies whole rows: out[k] = tokens[index[k]], zeros where index[k] is outside [0, rows). A warp per row.
#pragma once

#include "common/kernel.h"

namespace vtok {

constexpr int kPackWarps = 8;

template <class Word>
__global__ void __launch_bounds__(kPackWarps* kWarp)
    pack_kernel(const Word* tokens, int64_t rows, int64_t stride, int64_t words, const int64_t* index, int64_t count,
                Word* out) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kPackWarps + threadIdx.y;
  if (k >= count) return;
  const int64_t row = index[k];
  const bool inside = row >= 0 && row < rows;
  const Word* from = tokens + (inside ? row : 0) * stride;
  Word* to = out + k * words;
#pragma unroll 4
  for (int64_t w = threadIdx.x; w < words; w += kWarp) to[w] = inside ? from[w] : Word{};
}

template <class Word>
cudaError_t pack_words(const void* tokens, int64_t rows, int64_t stride, int64_t bytes, const int64_t* index,
                       int64_t count, void* out, cudaStream_t stream) {
  const int64_t size = sizeof(Word);
  return VTOK_LAUNCH(pack_kernel<Word>, dim3(ceil_div(count, kPackWarps)), dim3(kWarp, kPackWarps), 0, stream,
                     static_cast<const Word*>(tokens), rows, stride / size, bytes / size, index, count,
                     static_cast<Word*>(out));
}

// tokens: `rows` rows of `bytes` bytes, `stride` bytes apart; index [count]; out [count, bytes]. bytes, count > 0.
inline cudaError_t pack_launch(const void* tokens, int64_t rows, int64_t stride, int64_t bytes, const int64_t* index,
                               int64_t count, void* out, cudaStream_t stream) {
  const uint64_t alignment = reinterpret_cast<uint64_t>(tokens) | reinterpret_cast<uint64_t>(out) |
                             static_cast<uint64_t>(stride) | static_cast<uint64_t>(bytes);
  const auto words = alignment % 16 == 0  ? &pack_words<Word16>
                     : alignment % 4 == 0 ? &pack_words<uint32_t>
                     : alignment % 2 == 0 ? &pack_words<uint16_t>
                                          : &pack_words<uint8_t>;
  return words(tokens, rows, stride, bytes, index, count, out, stream);
}

VTOK_HOST_EXPORT("pack", pack_launch)

}  // namespace vtok
