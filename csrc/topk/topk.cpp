#include <algorithm>
#include <vector>

#include "common/stable.h"
#include "topk/topk_cpu.inc"

namespace vtok {

void check_topk(const Tensor& scores, const Tensor& cu_seqlens, const Tensor& cu_k, int64_t k) {
  expect_dim("topk", "scores", scores, 1, "(S,)");
  expect_dtype("topk", "scores", scores, ScalarType::Float);
  expect_cu_seqlens("topk", "cu_seqlens", cu_seqlens, scores);
  expect_index("topk", "cu_k", cu_k, scores, "(V+1,)");
  VTOK_EXPECT(cu_k.size(0) == cu_seqlens.size(0), "topk", text("cu_k of shape (V+1,)=", shape_text(cu_seqlens)),
              shape_text(cu_k));
  VTOK_EXPECT(k >= 0, "topk", "k >= 0", k);
}

namespace {

constexpr int64_t kTile = 65536;  // rows that one thread passes over at a time
constexpr int kDigit = 11;        // bits that one pass settles

struct Segment {
  const float* scores;
  int64_t first_row, rows, wanted;  // wanted: of its rows, whatever the slots
  int64_t *out, slots;
  bool largest;
};

// The rows above the key are chosen, and the first `equal` of those that have it.
struct Threshold {
  uint32_t key;
  int64_t equal;
};

// Calls body(tile, first row, rows) for every tile, in parallel unless this is a parallel region already.
template <class Body>
void over_tiles(int64_t rows, const Body& body) {
  torch::stable::parallel_for(0, (rows + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t, t * kTile, std::min(kTile, rows - t * kTile));
  });
}

Threshold find_threshold(const Segment& s) {
  Threshold found{0, s.wanted};
  if (s.wanted >= s.rows) return found;
  if (s.rows <= topk_cpu().few) {
    found.key = topk_cpu().select(s.scores, s.rows, s.largest, &found.equal);
    return found;
  }
  const int64_t tiles = (s.rows + kTile - 1) / kTile;
  std::vector<uint32_t> counts(tiles << kDigit);
  std::vector<int64_t> totals(1 << kDigit);
  for (int low = 32; low > 0;) {
    const int bits = std::min(kDigit, low);
    low -= bits;
    std::fill(counts.begin(), counts.end(), 0);
    std::fill(totals.begin(), totals.end(), 0);
    over_tiles(s.rows, [&](int64_t t, int64_t first, int64_t n) {
      topk_cpu().count(s.scores + first, n, s.largest, found.key, low, bits, &counts[t << kDigit]);
    });
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t b = 0; b < 1 << bits; ++b) totals[b] += counts[(t << kDigit) + b];
    uint32_t bin = (1u << bits) - 1;
    while (totals[bin] < found.equal) found.equal -= totals[bin--];
    found.key = found.key << bits | bin;
  }
  return found;
}

void choose(const Segment& s) {
  const int64_t taken = std::min({s.wanted, s.rows, s.slots});
  std::fill(s.out + taken, s.out + s.slots, -1);
  if (!taken) return;
  const Threshold found = find_threshold(s);
  if (s.rows <= kTile)
    return topk_cpu().emit(s.scores, s.rows, s.largest, found.key, found.equal, s.first_row, s.out, taken);
  const int64_t tiles = (s.rows + kTile - 1) / kTile;
  std::vector<int64_t> above(tiles), equal(tiles), slot(tiles + 1), left(tiles + 1, found.equal);
  over_tiles(s.rows, [&](int64_t t, int64_t first, int64_t n) {
    topk_cpu().tally(s.scores + first, n, s.largest, found.key, &above[t], &equal[t]);
  });
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t ties = std::min(equal[t], left[t]);
    slot[t + 1] = std::min(slot[t] + above[t] + ties, taken);
    left[t + 1] = left[t] - ties;
  }
  over_tiles(s.rows, [&](int64_t t, int64_t first, int64_t n) {
    topk_cpu().emit(s.scores + first, n, s.largest, found.key, left[t], s.first_row + first, s.out + slot[t],
                    taken - slot[t]);
  });
}

Tensor topk(const Tensor& scores, const Tensor& cu_seqlens, const Tensor& cu_k, int64_t k, bool largest) {
  check_topk(scores, cu_seqlens, cu_k, k);
  expect_ascending("topk", "cu_seqlens", cu_seqlens, scores.size(0), "S");
  expect_ascending("topk", "cu_k", cu_k);
  const Tensor values = torch::stable::contiguous(scores), rows = torch::stable::contiguous(cu_seqlens),
               slots = torch::stable::contiguous(cu_k);
  Tensor out = empty(cu_k, {k}, ScalarType::Long);
  const auto* from = static_cast<const float*>(values.const_data_ptr());
  const int64_t *cu = indices(rows), *ck = indices(slots), segments = cu_k.size(0) - 1;
  auto* to = mutable_indices(out);
  const auto segment = [&](int64_t v) {
    const int64_t begin = std::min(ck[v], k), end = std::min(ck[v + 1], k);
    return Segment{from + cu[v], cu[v], cu[v + 1] - cu[v], ck[v + 1] - ck[v], to + begin, end - begin, largest};
  };
  for (int64_t v = 0; v < segments; ++v)
    if (cu[v + 1] - cu[v] > kTile) choose(segment(v));
  const int64_t mean = segments ? cu[segments] / segments : 0;
  torch::stable::parallel_for(0, segments, 16384 / (mean + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      if (cu[v + 1] - cu[v] <= kTile) choose(segment(v));
  });
  std::fill(to + std::min(ck[segments], k), to + k, -1);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_topk); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("topk", TORCH_BOX(&topk)); }

}  // namespace vtok
