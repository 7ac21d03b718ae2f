// A stable counting sort of rows by group, one digit of the group after the other, the lowest first. One launch: each
// block takes a ticket, and tickets run through the phases in order, every tile of one phase before those of the next:
//   a histogram of every digit · for each digit, a stable scatter of the rows · the offsets
// A block waits only for lower tickets, which running blocks hold, so the wait ends whatever the hardware keeps
// resident. The time does not depend on how the rows are spread over the groups.
#pragma once

#include "common/scan.h"

namespace vtok {

constexpr int kGroupThreads = 512;
constexpr int kGroupWarps = kGroupThreads / kWarp;
constexpr int kGroupItems = 8;  // rows a thread carries
constexpr int kGroupTile = kGroupThreads * kGroupItems;
constexpr int kGroupDigit = 9;  // bits of a digit at most: a thread looks after a digit value
constexpr int kGroupLookBack = 4;
constexpr int64_t kGroupCount = 1, kGroupPrefix = 2;  // a look-back word: 4 times a number of rows, plus what it says

// What to run, and where in the workspace (words that start at zero) things lie.
struct GroupPlan {
  int64_t rows, k;
  int bits, bins, passes;    // bits of a digit, its values, digits of a group
  int64_t tiles, searches;   // blocks of a phase, and of the last
  int64_t histogram, words;  // after the ticket and the count of each phase's finished tiles; all words
};

inline GroupPlan group_plan(int64_t rows, int64_t k) {
  int width = 1;  // bits of the largest group, k - 1
  while (width < 63 && (k - 1) >> width > 0) ++width;
  GroupPlan plan{};
  plan.rows = rows;
  plan.k = k;
  plan.passes = (width + kGroupDigit - 1) / kGroupDigit;
  plan.bits = (width + plan.passes - 1) / plan.passes;
  plan.bins = 1 << plan.bits;
  plan.tiles = ceil_div(rows > 0 ? rows : 1, kGroupTile);
  plan.searches = ceil_div(rows > k ? rows : k + 1, kGroupTile);
  plan.histogram = 2 + plan.passes;
  plan.words = plan.histogram + plan.passes * plan.bins * (1 + plan.tiles);
  return plan;
}

struct GroupShared {
  int64_t ticket;
  int64_t sums[kGroupWarps];
  int64_t first[kGroupThreads + 1];        // slot of the first row of each digit value
  int counts[kGroupWarps][kGroupThreads];  // rows of each digit value, by warp; in the first phase by digit
};

VTOK_DEVICE int64_t group_read(const int64_t* word) { return *static_cast<const volatile int64_t*>(word); }
VTOK_DEVICE void group_write(int64_t* word, int64_t value) { *static_cast<volatile int64_t*>(word) = value; }

VTOK_DEVICE bool group_has(const GroupPlan& plan, int64_t g) { return g >= 0 && g < plan.k; }

VTOK_DEVICE int group_digit(const GroupPlan& plan, int64_t g, int pass) {
  return static_cast<int>(g >> (pass * plan.bits)) & (plan.bins - 1);
}

VTOK_DEVICE void group_histogram(const GroupPlan& plan, const int64_t* assignment, int64_t tile, int64_t* workspace,
                                 GroupShared& shared) {
  for (int pass = 0; pass < plan.passes; ++pass) shared.counts[pass][threadIdx.x] = 0;
  __syncthreads();
  for (int i = 0; i < kGroupItems; ++i) {
    const int64_t row = tile * kGroupTile + i * kGroupThreads + threadIdx.x;
    const int64_t g = row < plan.rows ? assignment[row] : -1;
    if (group_has(plan, g))
      for (int pass = 0; pass < plan.passes; ++pass) atomicAdd(&shared.counts[pass][group_digit(plan, g, pass)], 1);
  }
  __syncthreads();
  for (int pass = 0; pass < plan.passes; ++pass) {
    const int count = shared.counts[pass][threadIdx.x];
    if (count) atomic_add(workspace + plan.histogram + pass * plan.bins + threadIdx.x, count);
  }
}

// Fills shared.first for the digits of a pass; returns how many rows have a group.
VTOK_DEVICE int64_t group_first(const GroupPlan& plan, const int64_t* workspace, int pass, GroupShared& shared) {
  const int digit = threadIdx.x;
  int64_t total;
  const int64_t count = digit < plan.bins ? workspace[plan.histogram + pass * plan.bins + digit] : 0;
  shared.first[digit] = block_scan<kGroupThreads>(count, shared.sums, total);
  if (digit == 0) shared.first[kGroupThreads] = total;
  __syncthreads();
  return total;
}

// Rows of one digit value in the tiles before this one. words: the digit's word of tile 0; `bins` words to the next.
VTOK_DEVICE int64_t group_look_back(const int64_t* words, int64_t tile, int64_t bins) {
  int64_t before = 0;
  for (int64_t t = tile - 1; t >= 0;) {
    int64_t seen[kGroupLookBack];  // read together, for each read is a long wait
#pragma unroll
    for (int j = 0; j < kGroupLookBack; ++j) seen[j] = j <= t ? group_read(words + (t - j) * bins) : 0;
    bool more = true;
#pragma unroll
    for (int j = 0; j < kGroupLookBack; ++j) {
      more = more && seen[j] != 0;
      if (!more) continue;
      before += seen[j] / 4;
      t = seen[j] & kGroupPrefix ? -1 : t - 1;
      more = t >= 0;
    }
    if (!more && t >= 0) spin_yield();
  }
  return before;
}

// The lanes that have this lane's digit. No matter what it is for lanes without one (-1).
VTOK_DEVICE unsigned group_peers(int digit, int bits) {
  unsigned peers = __ballot_sync(kFullMask, digit >= 0);
  for (int b = 0; b < bits; ++b) {
    const unsigned ones = __ballot_sync(kFullMask, digit >> b & 1);
    peers &= digit >> b & 1 ? ones : ~ones;
  }
  return peers;
}

// Moves the rows that `from` lists (all rows, where it is null) to their place by one digit.
VTOK_DEVICE void group_pass(const GroupPlan& plan, const int64_t* assignment, int pass, int64_t tile,
                            const int64_t* from, int64_t* to, int64_t* workspace, GroupShared& shared) {
  const int64_t total = group_first(plan, workspace, pass, shared), listed = from ? total : plan.rows;
  if (tile * kGroupTile >= listed) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t row[kGroupItems];
  int digit[kGroupItems];  // -1 where there is no row or no group
#pragma unroll
  for (int i = 0; i < kGroupItems; ++i) {
    const int64_t at = tile * kGroupTile + (warp * kGroupItems + i) * kWarp + lane;
    row[i] = at < listed ? (from ? from[at] : at) : -1;
  }
#pragma unroll
  for (int i = 0; i < kGroupItems; ++i) {
    const int64_t g = row[i] >= 0 ? assignment[row[i]] : -1;
    digit[i] = group_has(plan, g) ? group_digit(plan, g, pass) : -1;
  }
  int* counts = shared.counts[warp];
  for (int d = lane; d < plan.bins; d += kWarp) counts[d] = 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kGroupItems; ++i) {
    const unsigned peers = group_peers(digit[i], plan.bits), lower = peers & ((1u << lane) - 1);
    const int value = digit[i];
    if (value >= 0) digit[i] |= (counts[value] + __popc(lower)) << kGroupDigit;  // above the digit: rank in the warp
    __syncwarp();
    if (value >= 0 && lower == 0) counts[value] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < plan.bins) {
    int64_t count = 0;
    for (int w = 0; w < kGroupWarps; ++w) {
      const int own = shared.counts[w][threadIdx.x];
      shared.counts[w][threadIdx.x] = static_cast<int>(count);
      count += own;
    }
    int64_t* words = workspace + plan.histogram + plan.bins * (plan.passes + pass * plan.tiles) + threadIdx.x;
    if (tile > 0) group_write(words + tile * plan.bins, 4 * count + kGroupCount);
    const int64_t before = group_look_back(words, tile, plan.bins);
    group_write(words + tile * plan.bins, 4 * (before + count) + kGroupPrefix);
    shared.first[threadIdx.x] += before;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGroupItems; ++i) {
    const int value = digit[i] & (plan.bins - 1), rank = digit[i] >> kGroupDigit;
    if (digit[i] >= 0) to[shared.first[value] + counts[value] + rank] = row[i];
  }
}

// The first slot of each group, by binary search in the sorted rows, and -1 in the slots that are left.
VTOK_DEVICE void group_offsets(const GroupPlan& plan, const int64_t* assignment, int64_t tile, const int64_t* workspace,
                               int64_t* members, int64_t* offsets, GroupShared& shared) {
  const int pass = plan.passes - 1;
  const int64_t total = group_first(plan, workspace, pass, shared);
  for (int i = 0; i < kGroupItems; ++i) {
    const int64_t g = tile * kGroupTile + i * kGroupThreads + threadIdx.x;  // and a slot
    if (g < plan.k) {
      const int digit = group_digit(plan, g, pass);  // the rows of the group lie among those of its highest digit
      int64_t low = shared.first[digit], high = shared.first[digit + 1];
      while (low < high) {
        const int64_t mid = low + (high - low) / 2;
        if (assignment[members[mid]] < g) low = mid + 1;
        else high = mid;
      }
      offsets[g] = low;
    }
    if (g == plan.k) offsets[g] = total;
    if (g >= total && g < plan.rows) members[g] = -1;
  }
}

__global__ void __launch_bounds__(kGroupThreads)
    group_kernel(GroupPlan plan, const int64_t* assignment, int64_t* members, int64_t* offsets, int64_t* scratch,
                 int64_t* workspace) {
  VTOK_SHARED(GroupShared, shared);
  int64_t* done = workspace + 1;  // finished tiles of each phase
  if (threadIdx.x == 0) shared.ticket = atomic_add(workspace, 1);
  __syncthreads();
  const int64_t ticket = shared.ticket, last = plan.passes + 1;
  const int64_t phase = ticket / plan.tiles < last ? ticket / plan.tiles : last, tile = ticket - phase * plan.tiles;
  if (phase > 0) {
    if (threadIdx.x == 0) {
      while (group_read(done + phase - 1) < plan.tiles) spin_yield();
      __threadfence();
    }
    __syncthreads();
  }
  if (phase == last) return group_offsets(plan, assignment, tile, workspace, members, offsets, shared);
  if (phase == 0) {
    group_histogram(plan, assignment, tile, workspace, shared);
  } else {  // rows go back and forth between scratch and members, and end in members
    const int pass = static_cast<int>(phase) - 1;
    const bool to_members = (plan.passes - pass) % 2;
    group_pass(plan, assignment, pass, tile,
               pass == 0    ? nullptr
               : to_members ? scratch
                            : members,
               to_members ? members : scratch, workspace, shared);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomic_add(done + phase, 1);
  }
}

// assignment, members [rows]; offsets [k+1]; scratch [rows], unless group_plan(rows, k).passes is 1; workspace
// [group_plan(rows, k).words], zeroed.
inline cudaError_t group_launch(const int64_t* assignment, int64_t rows, int64_t k, int64_t* members, int64_t* offsets,
                                int64_t* scratch, int64_t* workspace, cudaStream_t stream) {
  const GroupPlan plan = group_plan(rows, k);
  return VTOK_LAUNCH(group_kernel, dim3(plan.tiles * (1 + plan.passes) + plan.searches), dim3(kGroupThreads), 0, stream,
                     plan, assignment, members, offsets, scratch, workspace);
}

VTOK_HOST_EXPORT("group", group_launch)

}  // namespace vtok
