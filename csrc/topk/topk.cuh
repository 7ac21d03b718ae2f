// The best rows of each segment, ascending: a radix select settles, digit by digit from the top, the key of the last
// row taken and how many of its equals are taken; one ordered compaction then writes the rows. Only S, V and k are
// known at launch: a block per segment where they are short, its keys in shared memory if they fit, else four launches
// over tiles.
#pragma once

#include "topk/topk_block.cuh"

namespace vtok {

// --- a block per segment ----------------------------------------------------------------------------------------
template <bool kCached, class Index>
VTOK_DEVICE void topk_choose(const Topk& p, const TopkSegment& s, Index rows, uint32_t* cache, TopkDigit8 histogram,
                             TopkScratch& scratch) {
  const float* scores = p.scores + s.begin;
  const auto load = [&](Index i) { return topk_key(scores[i], p.largest); };
  const auto key = [&](Index i) { return kCached ? cache[i] : load(i); };
  TopkChoice choice{0, static_cast<uint32_t>(s.wanted)};
  for (int low = 24; low >= 0; low -= 8) {
    histogram.clear();
    if (low == 24)
      topk_each(rows, load, [&](Index i, uint32_t x) {
        if (kCached) cache[i] = x;
        histogram.add(x >> 24);
      });
    else
      topk_each(rows, key, [&](Index, uint32_t x) {
        if (x >> low >> 8 == choice.prefix) histogram.add(x >> low & 255);
      });
    __syncthreads();
    choice = topk_pick<256>(choice, histogram, scratch);
  }
  topk_emit(p, s, choice, s.begin, rows, key, [](uint64_t) { return uint64_t{0}; }, scratch);
}

__global__ void __launch_bounds__(kTopkMaxThreads) topk_segment_kernel(Topk p, int64_t shared_keys) {
  VTOK_DYNAMIC_SHARED(cache);
  VTOK_SHARED(TopkScratch, scratch);
  VTOK_SHARED(TopkDigit8::Words, counts);
  topk_pad_tail(p);
  if (blockIdx.x >= p.segments) return;
  const TopkSegment s = topk_segment(p, blockIdx.x);
  topk_pad(p, s.slot + s.wanted, s.end_slot, 0, 1);
  if (s.wanted == s.rows) return topk_copy(p, s, 0, s.rows);
  if (s.wanted == 0) return;
  if (s.rows <= shared_keys)
    topk_choose<true>(p, s, static_cast<int>(s.rows), reinterpret_cast<uint32_t*>(cache), {counts}, scratch);
  else topk_choose<false>(p, s, s.rows, nullptr, {counts}, scratch);
}

// --- tiles of long segments -------------------------------------------------------------------------------------
// Segment v has the tiles from cu[v] / size + v on: enough for its rows, whatever its length, without a prefix sum.
constexpr int kTopkTiles = 128;                // a segment of all rows has one more
constexpr uint64_t kTopkCounted = 1ull << 63;  // marks the sum of a tile as there

using TopkWord = unsigned long long;  // as the atomics have it
struct TopkTiles {
  int64_t size, count;
  TopkWord* ticket;     // zero at the start, as are sums and digits
  TopkWord* sums;       // [count] the tile's rows above the threshold and its equals, once counted
  uint32_t* digits;     // [segments, 2, 4096] counts of the second and the third digit
  uint32_t* heads;      // [count, 256] counts of the first digit
  TopkChoice* choices;  // [segments, 2] after the first and the second digit
};

struct TopkTile {
  int64_t segment, first, count;  // its segment, that one's first tile and how many it has
  int64_t begin, rows;            // rows of the segment
};

VTOK_DEVICE int64_t topk_first_tile(const Topk& p, const TopkTiles& tiles, int64_t v) {
  return v == 0 ? 0 : topk_clamp(p.cu_seqlens[v], 0, p.rows) / tiles.size + v;
}

VTOK_DEVICE TopkTile topk_tile(const Topk& p, const TopkTiles& tiles, int64_t index) {
  int64_t v = 0;
  for (int64_t high = p.segments; high - v > 1;) {
    const int64_t mid = v + (high - v) / 2;
    if (topk_first_tile(p, tiles, mid) <= index) v = mid;
    else high = mid;
  }
  const int64_t first = topk_first_tile(p, tiles, v), begin = (index - first) * tiles.size;
  return {v, first, topk_clamp(topk_first_tile(p, tiles, v + 1), first + 1, tiles.count) - first, begin,
          topk_clamp(topk_segment(p, v).rows - begin, 0, tiles.size)};
}

// What is settled after digit 0, 1 or 2. Every block of a segment finds it for itself; the first one notes it.
template <int kDigit>
VTOK_DEVICE TopkChoice topk_settle(const TopkTiles& tiles, const TopkTile& t, int64_t wanted, uint32_t* words,
                                   TopkScratch& scratch) {
  TopkChoice* const choices = tiles.choices + t.segment * 2;
  TopkChoice choice{0, static_cast<uint32_t>(wanted)};
  if constexpr (kDigit == 0) {
    const TopkDigit8 counts{words};
    const uint32_t* heads = tiles.heads + t.first * 256;
    counts.clear();
    topk_each(
        t.count * 256, [&](int64_t i) { return heads[i]; }, [&](int64_t i, uint32_t x) { counts.add(i % 256, x); });
    __syncthreads();
    choice = topk_pick<256>(choice, counts, scratch);
  } else {
    const uint32_t* counts = tiles.digits + (t.segment * 2 + kDigit - 1) * 4096;
    choice = topk_pick<4096>(choices[kDigit - 1], [&](int bin) { return counts[bin]; }, scratch);
  }
  if (kDigit < 2 && t.begin == 0 && threadIdx.x == 0) choices[kDigit] = choice;
  return choice;
}

__global__ void __launch_bounds__(kTopkMaxThreads) topk_heads_kernel(Topk p, TopkTiles tiles) {
  VTOK_SHARED(TopkDigit8::Words, words);
  const TopkDigit8 counts{words};
  const int64_t zeros = 1 + tiles.count + p.segments * 4096, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < zeros; i += step) tiles.ticket[i] = 0;
  const TopkTile t = topk_tile(p, tiles, blockIdx.x);
  const float* scores = p.scores + topk_segment(p, t.segment).begin + t.begin;
  counts.clear();
  topk_each(
      t.rows, [&](int64_t i) { return topk_key(scores[i], p.largest); },
      [&](int64_t, uint32_t x) { counts.add(x >> 24); });
  __syncthreads();
  uint32_t* const heads = tiles.heads + int64_t{blockIdx.x} * 256;
  for (int bin = threadIdx.x; bin < 256; bin += blockDim.x) heads[bin] = counts(bin);
}

template <int kDigit>
__global__ void __launch_bounds__(kTopkMaxThreads) topk_digit_kernel(Topk p, TopkTiles tiles) {
  VTOK_SHARED(TopkDigit12::Words, words);
  VTOK_SHARED(TopkScratch, scratch);
  const TopkTile t = topk_tile(p, tiles, blockIdx.x);
  const TopkSegment s = topk_segment(p, t.segment);
  if (s.wanted == 0 || s.wanted == s.rows || t.rows == 0) return;
  const TopkChoice choice = topk_settle<kDigit - 1>(tiles, t, s.wanted, words, scratch);
  const TopkDigit12 counts{words};
  const float* scores = p.scores + s.begin + t.begin;
  const int low = 24 - 12 * kDigit;
  counts.clear();
  topk_each(
      t.rows, [&](int64_t i) { return topk_key(scores[i], p.largest); },
      [&](int64_t, uint32_t x) {
        if (x >> low >> 12 == choice.prefix) counts.add(x >> low & 4095);
      });
  __syncthreads();
  uint32_t* const totals = tiles.digits + (t.segment * 2 + kDigit - 1) * 4096;
  for (int bin = threadIdx.x; bin < 4096; bin += blockDim.x)
    if (const uint32_t count = counts(bin)) atomicAdd(&totals[bin], count);
}

// Tiles go by ticket, so that those whose sums one waits for are running or done; each gives its own before it waits.
__global__ void __launch_bounds__(kTopkMaxThreads) topk_emit_kernel(Topk p, TopkTiles tiles) {
  VTOK_SHARED(TopkScratch, scratch);
  VTOK_SHARED(int64_t, ticket);
  if (threadIdx.x == 0) ticket = atomicAdd(tiles.ticket, TopkWord{1});
  __syncthreads();
  const int64_t index = ticket;
  const TopkTile t = topk_tile(p, tiles, index);
  const TopkSegment s = topk_segment(p, t.segment);
  topk_pad_tail(p);
  topk_pad(p, s.slot + s.wanted, s.end_slot, index - t.first, t.count);
  if (s.wanted == 0 || s.wanted == s.rows || t.rows == 0) {
    if (threadIdx.x == 0) atomicExch(&tiles.sums[index], TopkWord{kTopkCounted});
    if (s.wanted) topk_copy(p, s, t.begin, t.begin + t.rows);
    return;
  }
  const TopkChoice choice = topk_settle<2>(tiles, t, s.wanted, nullptr, scratch);
  const float* scores = p.scores + s.begin + t.begin;
  const auto sum_before = [&](uint64_t mine) {
    if (threadIdx.x == 0) atomicExch(&tiles.sums[index], TopkWord{kTopkCounted | mine});
    uint64_t before = 0;
    for (int64_t i = t.first + threadIdx.x; i < index; i += blockDim.x) {
      const volatile TopkWord* sum = tiles.sums + i;
      TopkWord seen;
      while (!((seen = *sum) & kTopkCounted)) spin_yield();
      before += seen ^ kTopkCounted;
    }
    return topk_sums(before, scratch).total;
  };
  topk_emit(
      p, s, choice, s.begin + t.begin, t.rows, [&](int64_t i) { return topk_key(scores[i], p.largest); }, sum_before,
      scratch);
}

// --- launch -----------------------------------------------------------------------------------------------------
struct TopkPlan {
  int64_t shared_keys;  // a block caches the keys of a segment up to here; tiles serve where the mean is longer
  int64_t tile, threads;
};

inline TopkPlan topk_plan(int64_t rows, int64_t segments, int64_t shared_bytes) {
  const int64_t most = (shared_bytes - 20 * 1024) / 4, tile = ceil_div(rows, kTopkTiles);
  const int64_t mean = segments ? rows / segments : 0;
  // More segments than processors: small blocks, of which several fit on one.
  return {segments <= kTopkTiles || 2 * mean + 1024 > most ? most : 2 * mean + 1024, tile < 8192 ? 8192 : tile,
          mean < 2048 ? 256 : kTopkMaxThreads};
}

inline bool topk_in_tiles(int64_t rows, int64_t segments, int64_t shared_keys) {
  return segments && rows > shared_keys * segments;
}

inline int64_t topk_workspace_bytes(int64_t rows, int64_t segments, int64_t shared_keys, int64_t tile) {
  if (!topk_in_tiles(rows, segments, shared_keys)) return 0;
  const int64_t count = rows / tile + segments;
  return 8 * (1 + count + segments * 4096 + count * 128 + segments * 2);
}

// scores [rows], rows < 2^32; cu_seqlens, cu_k [segments + 1]; out [slots]; the workspace is 8-byte aligned.
inline cudaError_t topk_launch(const float* scores, int64_t rows, const int64_t* cu_seqlens, const int64_t* cu_k,
                               int64_t segments, int64_t slots, bool largest, int64_t* out, void* workspace,
                               int64_t shared_keys, int64_t tile, int64_t threads, cudaStream_t stream) {
  const Topk p{scores, rows, cu_seqlens, cu_k, segments, slots, largest, out};
  const dim3 block(threads);
  if (!topk_in_tiles(rows, segments, shared_keys)) {
    const int64_t cached = shared_keys < rows ? shared_keys : rows;
    return VTOK_LAUNCH(topk_segment_kernel, dim3(segments ? segments : 1), block, cached * 4, stream, p, cached);
  }
  TopkTiles tiles{tile, rows / tile + segments, static_cast<TopkWord*>(workspace), nullptr, nullptr, nullptr, nullptr};
  tiles.sums = tiles.ticket + 1;
  tiles.digits = reinterpret_cast<uint32_t*>(tiles.sums + tiles.count);
  tiles.heads = tiles.digits + segments * 8192;
  tiles.choices = reinterpret_cast<TopkChoice*>(tiles.heads + tiles.count * 256);
  for (const auto kernel : {topk_heads_kernel, topk_digit_kernel<1>, topk_digit_kernel<2>, topk_emit_kernel})
    if (const cudaError_t error = VTOK_LAUNCH(kernel, dim3(tiles.count), block, 0, stream, p, tiles)) return error;
  return cudaSuccess;
}

VTOK_HOST_EXPORT("topk", topk_launch)

}  // namespace vtok
