// What one block does for topk: keys, counting, settling a digit, and writing the chosen rows in order. Every score has
// a 32-bit key, greater where the score is better; 0 is NaN.
#pragma once

#include "common/kernel.h"

namespace vtok {

constexpr int kTopkMaxThreads = 1024;
constexpr int kTopkBatch = 8;  // loads in flight per thread

struct Topk {
  const float* scores;
  int64_t rows;
  const int64_t *cu_seqlens, *cu_k;
  int64_t segments, slots;
  bool largest;
  int64_t* out;
};

// The rows whose key starts with `prefix` have `wanted` rows among them that are taken; all rows above are.
struct TopkChoice {
  uint32_t prefix, wanted;
};

struct TopkScratch {
  uint64_t warps[32];
  TopkChoice choice;
};

// What a block needs to know of a segment. The boundaries come from the device unchecked: rows stay inside [0, S),
// slots inside [0, k).
struct TopkSegment {
  int64_t begin, rows, wanted, slot, end_slot;
};

VTOK_DEVICE int64_t topk_clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

VTOK_DEVICE TopkSegment topk_segment(const Topk& p, int64_t v) {
  const int64_t begin = topk_clamp(p.cu_seqlens[v], 0, p.rows), end = topk_clamp(p.cu_seqlens[v + 1], begin, p.rows);
  const int64_t from = p.cu_k[v], to = p.cu_k[v + 1];
  const uint64_t all = end - begin, asked = to > from ? static_cast<uint64_t>(to) - static_cast<uint64_t>(from) : 0;
  return {begin, end - begin, static_cast<int64_t>(asked < all ? asked : all), topk_clamp(from, 0, p.slots),
          topk_clamp(to, 0, p.slots)};
}

VTOK_DEVICE uint32_t topk_key(float score, bool largest) {
  const uint32_t raw = bit_cast<uint32_t>(score), bits = largest ? raw : raw ^ 0x80000000u;
  if ((raw & 0x7fffffffu) > 0x7f800000u) return 0;
  return bits > 0x80000000u ? ~bits : bits | 0x80000000u;  // -0 gets the key of +0
}

// Calls visit(i, value(i)) for i < n, one thread each, with a batch of loads in flight. Index is as wide as n needs.
template <class Index, class Value, class Visit>
VTOK_DEVICE void topk_each(Index n, const Value& value, const Visit& visit) {
  const Index step = blockDim.x;
  Index i = threadIdx.x;
  for (; i + (kTopkBatch - 1) * step < n; i += kTopkBatch * step) {
    uint32_t x[kTopkBatch];
#pragma unroll
    for (int j = 0; j < kTopkBatch; ++j) x[j] = value(i + j * step);
#pragma unroll
    for (int j = 0; j < kTopkBatch; ++j) visit(i + j * step, x[j]);
  }
  for (; i < n; i += step) visit(i, value(i));
}

// Counters in shared memory, in copies, so that lanes that meet in one bin meet in few words.
template <int kBins, int kCopies>
struct TopkHistogram {
  using Words = uint32_t[kBins * kCopies];
  uint32_t* counts;
  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x; i < kBins * kCopies; i += blockDim.x) counts[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(uint32_t bin, uint32_t by = 1) const {
    atomicAdd(&counts[bin * kCopies + threadIdx.x % kCopies], by);
  }
  __device__ __forceinline__ uint32_t operator()(int bin) const {
    uint32_t sum = 0;
    for (int c = 0; c < kCopies; ++c) sum += counts[bin * kCopies + (c + threadIdx.x) % kCopies];
    return sum;
  }
};
using TopkDigit8 = TopkHistogram<256, 16>;
using TopkDigit12 = TopkHistogram<4096, 2>;

struct TopkSums {
  uint64_t before, total;  // of the threads before this one, of the block
};

VTOK_DEVICE TopkSums topk_sums(uint64_t mine, TopkScratch& scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint64_t upto = mine;
  for (int by = 1; by < kWarp; by *= 2) {
    const uint64_t other = __shfl_up_sync(kFullMask, upto, by);
    if (lane >= by) upto += other;
  }
  if (lane == kWarp - 1) scratch.warps[warp] = upto;
  __syncthreads();
  uint64_t total = lane * kWarp < static_cast<int>(blockDim.x) ? scratch.warps[lane] : 0,
           before = lane < warp ? total : 0;
  for (int with = kWarp / 2; with; with /= 2) {
    total += __shfl_xor_sync(kFullMask, total, with);
    before += __shfl_xor_sync(kFullMask, before, with);
  }
  __syncthreads();
  return {before + upto - mine, total};
}

// Settles the next digit: walks the bins from the top until the wanted rows are among those passed.
template <int kBins, class Count>
VTOK_DEVICE TopkChoice topk_pick(TopkChoice choice, const Count& count, TopkScratch& scratch) {
  const int share = (kBins + blockDim.x - 1) / blockDim.x, top = kBins - 1 - static_cast<int>(threadIdx.x) * share;
  const int stop = top - share < -1 ? -1 : top - share;
  uint64_t mine = 0;
  for (int bin = top; bin > stop; --bin) mine += count(bin);
  uint64_t before = topk_sums(mine, scratch).before;
  const bool last = threadIdx.x + 1 == blockDim.x;  // takes what nobody claims, which only bad boundaries leave
  if (before < choice.wanted && (choice.wanted <= before + mine || last)) {
    int bin = top < 0 ? 0 : top;
    for (uint64_t here; bin > 0 && before + (here = count(bin)) < choice.wanted; --bin) before += here;
    scratch.choice = {choice.prefix * kBins + bin, static_cast<uint32_t>(choice.wanted - before)};
  }
  __syncthreads();
  return scratch.choice;
}

// Writes the chosen ones of n consecutive rows. Each warp has a run of them; `before` asks for what the rows before
// the block's own sum to, given their sum: rows above the threshold in the high half, its equals in the low one.
template <class Index, class Key, class Before>
VTOK_DEVICE void topk_emit(const Topk& p, const TopkSegment& s, TopkChoice threshold, int64_t first_row, Index n,
                           const Key& key, const Before& before, TopkScratch& scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Index threads = blockDim.x, share = (n + threads - 1) / threads * kWarp;
  const Index begin = warp * share, end = begin + share < n ? begin + share : n;
  uint64_t mine = 0;
  for (Index i = begin + lane; i < end; i += kWarp) {
    const uint32_t x = key(i);
    mine += x > threshold.prefix ? 1ull << 32 : x == threshold.prefix;
  }
  const TopkSums sums = topk_sums(mine, scratch);
  const uint64_t upto = before(sums.total) + __shfl_sync(kFullMask, sums.before, 0);
  uint64_t above = upto >> 32, equal = upto & 0xffffffffu;
  for (Index i = begin + lane; i - lane < end; i += kWarp) {
    const uint32_t x = i < end ? key(i) : 0;
    const unsigned greater = __ballot_sync(kFullMask, i < end && x > threshold.prefix);
    const unsigned same = __ballot_sync(kFullMask, i < end && x == threshold.prefix), lower = (1u << lane) - 1;
    const uint64_t ties = equal + __popc(same & lower), taken = ties < threshold.wanted ? ties : threshold.wanted;
    const uint64_t slot = s.slot + above + __popc(greater & lower) + taken;
    const bool chosen = greater >> lane & 1u || (same >> lane & 1u && ties < threshold.wanted);
    if (chosen && slot < static_cast<uint64_t>(p.slots)) p.out[slot] = first_row + i;
    above += __popc(greater);
    equal += __popc(same);
  }
}

// Writes rows [from, to) of a segment that is taken whole.
VTOK_DEVICE void topk_copy(const Topk& p, const TopkSegment& s, int64_t from, int64_t to) {
  for (int64_t i = from + threadIdx.x; i < to && s.slot + i < p.slots; i += blockDim.x) p.out[s.slot + i] = s.begin + i;
}

// -1 into the slots [from, to), by `blocks` blocks of which this is number `block`.
VTOK_DEVICE void topk_pad(const Topk& p, int64_t from, int64_t to, int64_t block, int64_t blocks) {
  for (int64_t i = from + block * blockDim.x + threadIdx.x; i < to; i += blocks * blockDim.x) p.out[i] = -1;
}
VTOK_DEVICE void topk_pad_tail(const Topk& p) {
  topk_pad(p, topk_clamp(p.cu_k[p.segments], 0, p.slots), p.slots, blockIdx.x, gridDim.x);
}

}  // namespace vtok
