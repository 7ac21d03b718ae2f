#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bipartite_match/bipartite_match_cpu.inc"
#include "common/stable.h"

namespace vtok {

void check_bipartite_match(const Tensor& rows, const Tensor& cu_seqlens, int64_t split, int64_t guarded, double eps) {
  const char* op = "bipartite_match";
  expect_dim(op, "rows", rows, 2, "(S, D)");
  expect_float(op, "rows", rows);
  expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, rows);
  VTOK_EXPECT(split >= 2, op, "split >= 2", split);
  VTOK_EXPECT(guarded >= 0, op, "protected >= 0", guarded);
  VTOK_EXPECT(std::isfinite(eps) && eps >= 0, op, "eps finite and >= 0", eps);
}

namespace {

const MatchEntries& entries(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return bipartite_match_cpu().f32;
    case ScalarType::Half: return bipartite_match_cpu().f16;
    case ScalarType::BFloat16: return bipartite_match_cpu().bf16;
    default: return bipartite_match_cpu().f64;
  }
}

// The tiles of sources of all segments.
std::vector<MatchTile> tiles_of(const int64_t* cu, int64_t segments, const MatchRule& rule) {
  std::vector<MatchTile> tiles;
  for (int64_t v = 0; v < segments; ++v) {
    const int64_t rows = cu[v + 1] - cu[v], sources = sources_in(rule, rows);
    for (int64_t first = sources_in(rule, std::min(rows, rule.guarded)); first < sources; first += kMatchSources)
      tiles.push_back({cu[v], rows, first, std::min(kMatchSources, sources - first)});
  }
  return tiles;
}

std::tuple<Tensor, Tensor> bipartite_match(const Tensor& rows, const Tensor& cu_seqlens, int64_t split, int64_t guarded,
                                           double eps) {
  check_bipartite_match(rows, cu_seqlens, split, guarded, eps);
  const int64_t count = rows.size(0), D = rows.size(1);
  expect_ascending("bipartite_match", "cu_seqlens", cu_seqlens, count, "S");
  const Tensor source = dense_rows(rows), bounds = torch::stable::contiguous(cu_seqlens);
  Tensor best = empty(rows, {count}, ScalarType::Float), target = empty(cu_seqlens, {count}, ScalarType::Long);
  Tensor norms = empty(rows, {count}, ScalarType::Float);
  auto* const to = static_cast<float*>(best.mutable_data_ptr());
  auto* const at = mutable_indices(target);
  const MatchRule rule{split, guarded};
  const DotCall of{source.const_data_ptr(), source.stride(0), D, static_cast<float*>(norms.mutable_data_ptr())};
  const MatchCall call{of, rule, static_cast<float>(eps), to, at};
  const MatchEntries& run = entries(rows.scalar_type());
  torch::stable::parallel_for(0, count, grain(D * static_cast<int64_t>(rows.element_size())),
                              [&](int64_t begin, int64_t end) {
                                std::fill(to + begin, to + end, -std::numeric_limits<float>::infinity());
                                for (int64_t s = begin; s < end; ++s) at[s] = s;
                                run.norms(of, begin, end);
                              });
  const std::vector<MatchTile> tiles = tiles_of(indices(bounds), bounds.size(0) - 1, rule);
  torch::stable::parallel_for(0, static_cast<int64_t>(tiles.size()), 1,
                              [&](int64_t begin, int64_t end) { run.match(call, tiles.data() + begin, end - begin); });
  return {best, target};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_bipartite_match); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("bipartite_match", TORCH_BOX(&bipartite_match)); }

}  // namespace vtok
