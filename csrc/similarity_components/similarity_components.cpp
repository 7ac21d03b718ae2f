#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/stable.h"
#include "similarity_components/similarity_components_cpu.inc"

namespace vtok {

void check_similarity_components(const Tensor& rows, const Tensor& cu_seqlens, double threshold, double eps) {
  const char* op = "similarity_components";
  expect_dim(op, "rows", rows, 2, "(S, D)");
  expect_float(op, "rows", rows);
  expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, rows);
  VTOK_EXPECT(!std::isnan(threshold), op, "threshold to be a number", "nan");
  VTOK_EXPECT(std::isfinite(eps) && eps >= 0, op, "eps finite and >= 0", eps);
}

namespace {

const LinkEntries& entries(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return similarity_components_cpu().f32;
    case ScalarType::Half: return similarity_components_cpu().f16;
    case ScalarType::BFloat16: return similarity_components_cpu().bf16;
    default: return similarity_components_cpu().f64;
  }
}

// The tiles of all groups: of each group one from its start, which meets many, then one from its end, which meets few,
// so that threads that take neighbouring tiles have as much to do.
std::vector<LinkTile> tiles_of(const int64_t* cu, int64_t groups) {
  std::vector<LinkTile> tiles;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t count = (cu[g + 1] - cu[g] + kLinkRows - 1) / kLinkRows;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = cu[g] + (t % 2 ? count - 1 - t / 2 : t / 2) * kLinkRows;
      tiles.push_back({row, std::min(kLinkRows, cu[g + 1] - row), cu[g + 1]});
    }
  }
  return tiles;
}

Tensor similarity_components(const Tensor& rows, const Tensor& cu_seqlens, double threshold, double eps) {
  check_similarity_components(rows, cu_seqlens, threshold, eps);
  const int64_t count = rows.size(0), D = rows.size(1), groups = cu_seqlens.size(0) - 1;
  expect_ascending("similarity_components", "cu_seqlens", cu_seqlens, count, "S");
  const Tensor source = dense_rows(rows), bounds = torch::stable::contiguous(cu_seqlens);
  Tensor label = empty(cu_seqlens, {count}, ScalarType::Long), norms = empty(rows, {count}, ScalarType::Float);
  int64_t* const labels = mutable_indices(label);
  const DotCall of{source.const_data_ptr(), source.stride(0), D, static_cast<float*>(norms.mutable_data_ptr())};
  const LinkCall call{of, static_cast<float>(threshold), static_cast<float>(eps), labels};
  const LinkEntries& run = entries(rows.scalar_type());
  const int64_t last = indices(bounds)[groups];
  std::iota(labels, labels + last, int64_t{0});
  std::fill(labels + last, labels + count, int64_t{-1});
  torch::stable::parallel_for(0, last, grain(D * static_cast<int64_t>(rows.element_size())),
                              [&](int64_t begin, int64_t end) { run.norms(of, begin, end); });
  const std::vector<LinkTile> tiles = tiles_of(indices(bounds), groups);
  torch::stable::parallel_for(0, static_cast<int64_t>(tiles.size()), 1,
                              [&](int64_t begin, int64_t end) { run.join(call, tiles.data() + begin, end - begin); });
  similarity_components_cpu().flatten(labels, last);
  return label;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_similarity_components); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("similarity_components", TORCH_BOX(&similarity_components)); }

}  // namespace vtok
