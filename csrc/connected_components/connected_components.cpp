#include <numeric>

#include "common/stable.h"
#include "connected_components/connected_components_cpu.inc"

namespace vtok {

void check_connected_components(const Tensor& source, const Tensor& target, int64_t n) {
  const char* op = "connected_components";
  expect_dim(op, "source", source, 1, "(E,)");
  expect_dtype(op, "source", source, ScalarType::Long);
  expect_index(op, "target", target, source, "(E,)");
  VTOK_EXPECT(target.size(0) == source.size(0), op, text("target of shape (E,)=(", source.size(0), ",)"),
              shape_text(target));
  VTOK_EXPECT(n >= 0, op, "n >= 0", n);
}

namespace {

constexpr int64_t kLeast = 16384;  // edges that make another thread worth it

Tensor connected_components(const Tensor& source, const Tensor& target, int64_t n) {
  check_connected_components(source, target, n);
  const Tensor from = torch::stable::contiguous(source), to = torch::stable::contiguous(target);
  Tensor label = empty(source, {n}, ScalarType::Long);
  const int64_t *sources = indices(from), *targets = indices(to);
  int64_t* const labels = mutable_indices(label);
  const ConnectedComponentsCpu& cpu = connected_components_cpu();
  std::iota(labels, labels + n, int64_t{0});
  torch::stable::parallel_for(0, source.size(0), kLeast,
                              [&](int64_t begin, int64_t end) { cpu.join(sources, targets, begin, end, n, labels); });
  cpu.flatten(labels, n);
  return label;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_connected_components); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("connected_components", TORCH_BOX(&connected_components)); }

}  // namespace vtok
