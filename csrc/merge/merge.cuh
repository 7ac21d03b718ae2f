// Reduces groups of rows: a warp per group and chunk of columns. The sums stay in registers and take the members in
// list order; kMergeAhead members are loaded before the first of them is added.
#pragma once

#include <type_traits>

#include "common/kernel.h"

namespace vtok {

constexpr int kMergeWarps = 8;
constexpr int kMergeAhead = 4;

template <class T>
struct MergeKernelArgs {
  using A = accumulator_t<T>;
  const T* tokens;  // `rows` rows of `width` values, `stride` values apart
  int64_t rows, stride, width;
  const int64_t* members;  // [listed]
  int64_t listed;
  const int64_t* offsets;  // [groups + 1]
  int64_t groups;
  const A* weights;  // [rows] or null
  bool mean;         // else the sum is not divided
  T* values;         // [groups, width]
  A* weight;         // [groups]
};

// What one lane moves, and the values in it.
template <int kBytes>
using MergeWord =
    std::conditional_t<kBytes == 16, Word16,
                       std::conditional_t<kBytes == 8, uint64_t, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
template <class T, int N>
struct MergeValues {
  T v[N];
};

VTOK_DEVICE int64_t clamp_offset(int64_t offset, int64_t listed) {
  return offset < 0 ? 0 : offset < listed ? offset : listed;
}

template <bool kMax, class A>
VTOK_DEVICE A merge_take(A sum, A w, A x) {
  if constexpr (kMax) return x > sum || x != x ? x : sum;
  else return add_rn(sum, mul_rn(w, x));
}

template <class T, int N, bool kMax>
__global__ void __launch_bounds__(kMergeWarps* kWarp) merge_kernel(MergeKernelArgs<T> args, int64_t chunks) {
  using A = accumulator_t<T>;
  using Word = MergeWord<N * sizeof(T)>;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.y, group = id / chunks;
  if (group >= args.groups) return;
  const int64_t chunk = id % chunks, column = (chunk * kWarp + threadIdx.x) * N;
  const bool mine = column < args.width;
  const int64_t begin = clamp_offset(args.offsets[group], args.listed);
  const int64_t end = clamp_offset(args.offsets[group + 1], args.listed);
  A sum[N], total = 0;
  bool some = false;
  for (int i = 0; i < N; ++i) sum[i] = kMax ? -static_cast<A>(INFINITY) : A{0};
  for (int64_t place = begin; place < end; place += kMergeAhead) {
    int64_t row[kMergeAhead];
    Word word[kMergeAhead];
    A w[kMergeAhead];
#pragma unroll
    for (int i = 0; i < kMergeAhead; ++i) {
      row[i] = place + i < end ? args.members[place + i] : -1;
      if (row[i] >= args.rows) row[i] = -1;
    }
#pragma unroll
    for (int i = 0; i < kMergeAhead; ++i) {
      w[i] = row[i] >= 0 && args.weights ? args.weights[row[i]] : A{1};
      if (row[i] >= 0 && mine) word[i] = *reinterpret_cast<const Word*>(args.tokens + row[i] * args.stride + column);
    }
#pragma unroll
    for (int i = 0; i < kMergeAhead; ++i) {
      if (row[i] < 0) continue;
      some = true;
      total = add_rn(total, w[i]);
      const auto x = bit_cast<MergeValues<T, N>>(word[i]);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] = merge_take<kMax>(sum[n], w[i], widen(x.v[n]));
    }
  }
  if (chunk == 0 && threadIdx.x == 0) args.weight[group] = total;
  if (!mine) return;
  const bool zero = !some || (args.mean && total == 0);
  MergeValues<T, N> out;
  for (int n = 0; n < N; ++n) out.v[n] = narrow<T>(zero ? A{0} : args.mean ? div_rn(sum[n], total) : sum[n]);
  store_word(reinterpret_cast<Word*>(args.values + group * args.width + column), bit_cast<Word>(out));
}

template <class T, int N>
cudaError_t merge_words(const MergeKernelArgs<T>& args, bool max, cudaStream_t stream) {
  const int64_t chunks = args.width ? ceil_div(args.width, N * kWarp) : 1;
  const dim3 grid(ceil_div(args.groups * chunks, kMergeWarps)), block(kWarp, kMergeWarps);
  return max ? VTOK_LAUNCH((merge_kernel<T, N, true>), grid, block, 0, stream, args, chunks)
             : VTOK_LAUNCH((merge_kernel<T, N, false>), grid, block, 0, stream, args, chunks);
}

// groups > 0; mean and max not both, neither is the sum.
template <class T>
cudaError_t merge_launch(const T* tokens, int64_t rows, int64_t stride, int64_t width, const int64_t* members,
                         int64_t listed, const int64_t* offsets, int64_t groups, const accumulator_t<T>* weights,
                         bool mean, bool max, T* values, accumulator_t<T>* weight, cudaStream_t stream) {
  const MergeKernelArgs<T> args{tokens,  rows,   stride,  width, members, listed,
                                offsets, groups, weights, mean,  values,  weight};
  const uint64_t alignment = reinterpret_cast<uint64_t>(tokens) | reinterpret_cast<uint64_t>(values) |
                             static_cast<uint64_t>(stride * sizeof(T)) | static_cast<uint64_t>(width * sizeof(T));
  if (alignment % 16 == 0) return merge_words<T, 16 / sizeof(T)>(args, max, stream);
  if constexpr (sizeof(T) == 2)
    if (alignment % 4 == 0) return merge_words<T, 2>(args, max, stream);
  return merge_words<T, 1>(args, max, stream);
}

VTOK_HOST_EXPORT("merge_float32", merge_launch<float>)
VTOK_HOST_EXPORT("merge_float16", merge_launch<f16>)
VTOK_HOST_EXPORT("merge_bfloat16", merge_launch<bf16>)
VTOK_HOST_EXPORT("merge_float64", merge_launch<double>)

}  // namespace vtok
