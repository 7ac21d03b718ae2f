// Lists the kept rows of a mask in order. Launch 1 counts the kept rows of each block's span; launch 2 sums the spans
// before it, which gives every row its slot, and writes rows, the -1 tail and what each video kept. Spans, not tiles,
// so that the sums stay short: there are never more than kSpans.
#pragma once

#include "common/scan.h"

namespace vtok {

constexpr int kCompactThreads = 256;
constexpr int kCompactRows = 16;                              // rows a thread looks at at a time, one 16-byte word
constexpr int kCompactTile = kCompactThreads * kCompactRows;  // and a block
constexpr int64_t kCompactSpans = 512;

struct CompactSpans {
  int64_t count, tiles;  // blocks, and tiles in the span of each
};

inline CompactSpans compact_spans(int64_t rows, int64_t capacity) {
  const int64_t tiles = ceil_div(rows, kCompactTile), work = ceil_div(rows > capacity ? rows : capacity, kCompactTile);
  const int64_t count = work < 1 ? 1 : work < kCompactSpans ? work : kCompactSpans;
  return {count, ceil_div(tiles, count)};
}

inline int64_t compact_workspace(int64_t rows, int64_t capacity) { return compact_spans(rows, capacity).count; }

// Bit j is set where row first + j is kept, j < 16. Rows from `end` on are not.
VTOK_DEVICE unsigned compact_bits(const uint8_t* keep, int64_t first, int64_t end) {
  unsigned bits = 0;
  if (first + kCompactRows <= end && reinterpret_cast<uint64_t>(keep + first) % kCompactRows == 0) {
    const Word16 word = *reinterpret_cast<const Word16*>(keep + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t w = word.w[i];
      const uint32_t ones = ((((w & 0x7f7f7f7fu) + 0x7f7f7f7fu) | w) >> 7) & 0x01010101u;  // 1 in each nonzero byte
      bits |= (ones * 0x01020408u >> 24) << (4 * i);                                       // byte j's one to bit j
    }
  } else {
    for (int j = 0; j < kCompactRows && first + j < end; ++j) bits |= (keep[first + j] != 0 ? 1u : 0u) << j;
  }
  return bits;
}

struct CompactShared {
  int64_t sums[kCompactThreads / kWarp];
  int64_t boundaries[2];           // those that lie in the tile: [first, last)
  int before[kCompactThreads];     // kept rows of the tile before each thread's
  uint16_t bits[kCompactThreads];  // and each thread's own
  uint16_t rows[kCompactTile];     // the tile's kept rows, from its first row
};

// The rows that count: those before the last boundary, which is not trusted.
VTOK_DEVICE int64_t compact_end(const int64_t* cu, int64_t videos, int64_t rows) {
  const int64_t end = cu[videos];
  return end < 0 ? 0 : end < rows ? end : rows;
}

// counts[v] starts at 0 here; launch 2 adds to it.
__global__ void __launch_bounds__(kCompactThreads)
    compact_count_kernel(const uint8_t* keep, int64_t rows, const int64_t* cu, int64_t videos, int64_t tiles,
                         int64_t* counts, int64_t* spans) {
  VTOK_SHARED(CompactShared, shared);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kCompactThreads;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * kCompactThreads + threadIdx.x; v < videos; v += threads)
    counts[v] = 0;
  const int64_t end = compact_end(cu, videos, rows), first = blockIdx.x * tiles * kCompactTile;
  int64_t kept = 0, total;
  for (int64_t t = 0; t < tiles; ++t)
    kept += __popc(compact_bits(keep, first + t * kCompactTile + threadIdx.x * kCompactRows, end));
  block_scan<kCompactThreads>(kept, shared.sums, total);
  if (threadIdx.x == 0) spans[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kCompactThreads)
    compact_list_kernel(const uint8_t* keep, int64_t rows, const int64_t* cu, int64_t videos, int64_t tiles,
                        const int64_t* spans, int64_t* index, int64_t capacity, int64_t* counts) {
  VTOK_SHARED(CompactShared, shared);
  const int thread = threadIdx.x;
  int64_t lower = 0, all = 0, slot, total;
  for (int64_t b = thread; b < gridDim.x; b += kCompactThreads) {
    all += spans[b];
    lower += b < blockIdx.x ? spans[b] : 0;
  }
  block_scan<kCompactThreads>(lower, shared.sums, slot);
  block_scan<kCompactThreads>(all, shared.sums, total);

  const int64_t end = compact_end(cu, videos, rows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t start = (blockIdx.x * tiles + t) * kCompactTile;
    unsigned bits = compact_bits(keep, start + thread * kCompactRows, end);
    int64_t kept;
    int rank = static_cast<int>(block_scan<kCompactThreads>(__popc(bits), shared.sums, kept));
    shared.before[thread] = rank;  // the barriers of the scan lie between this and the last tile's reads
    shared.bits[thread] = static_cast<uint16_t>(bits);
    if (thread < 2) shared.boundaries[thread] = find_video(cu, videos + 1, start + thread * kCompactTile) + 1;
    for (; bits; bits &= bits - 1)
      shared.rows[rank++] = static_cast<uint16_t>(thread * kCompactRows + __ffs(static_cast<int>(bits)) - 1);
    __syncthreads();
    for (int64_t j = thread; j < kept && slot + j < capacity; j += kCompactThreads)
      index[slot + j] = start + shared.rows[j];
    // A video keeps what lies before its end less what lies before its start: each boundary adds to one and takes
    // from the next.
    for (int64_t v = shared.boundaries[0] + thread; v < shared.boundaries[1]; v += kCompactThreads) {
      const int64_t last = cu[v] - start - 1;  // the row before the boundary
      if (last < 0 || last >= kCompactTile) continue;
      const unsigned own = shared.bits[last / kCompactRows] & ((2u << last % kCompactRows) - 1);
      const int64_t before = slot + shared.before[last / kCompactRows] + __popc(own);
      if (v > 0) atomic_add(counts + v - 1, before);
      if (v < videos) atomic_add(counts + v, -before);
    }
    slot += kept;
  }
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kCompactThreads;
  for (int64_t i = total + static_cast<int64_t>(blockIdx.x) * kCompactThreads + thread; i < capacity; i += threads)
    index[i] = -1;
}

// keep [rows] bytes; cu [videos+1]; index [capacity]; counts [videos]; workspace [compact_workspace(rows, capacity)].
inline cudaError_t compact_launch(const uint8_t* keep, int64_t rows, const int64_t* cu, int64_t videos, int64_t* index,
                                  int64_t capacity, int64_t* counts, int64_t* workspace, cudaStream_t stream) {
  const CompactSpans spans = compact_spans(rows, capacity);
  const cudaError_t error = VTOK_LAUNCH(compact_count_kernel, dim3(spans.count), dim3(kCompactThreads), 0, stream, keep,
                                        rows, cu, videos, spans.tiles, counts, workspace);
  if (error != cudaSuccess) return error;
  return VTOK_LAUNCH(compact_list_kernel, dim3(spans.count), dim3(kCompactThreads), 0, stream, keep, rows, cu, videos,
                     spans.tiles, workspace, index, capacity, counts);
}

VTOK_HOST_EXPORT("compact", compact_launch)

}  // namespace vtok
