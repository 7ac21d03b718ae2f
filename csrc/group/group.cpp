#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "common/stable.h"
#include "group/group_cpu.inc"

namespace vtok {

void check_group(const Tensor& assignment, int64_t k) {
  expect_dim("group", "assignment", assignment, 1, "(S,)");
  expect_dtype("group", "assignment", assignment, ScalarType::Long);
  VTOK_EXPECT(k >= 0, "group", "k >= 0", k);
}

namespace {

constexpr int64_t kLeast = 65536;  // rows that make another chunk, and so another thread, worth its table of k cursors

std::tuple<Tensor, Tensor> group(const Tensor& assignment, int64_t k) {
  check_group(assignment, k);
  const int64_t rows = assignment.size(0);
  const Tensor groups = torch::stable::contiguous(assignment);
  Tensor members = empty(assignment, {rows}, ScalarType::Long), offsets = empty(assignment, {k + 1}, ScalarType::Long);
  const int64_t* from = indices(groups);
  int64_t *to = mutable_indices(members), *ends = mutable_indices(offsets);
  const GroupCpu& cpu = group_cpu();

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks = std::clamp<int64_t>(rows / std::max(k, kLeast), 1, threads);
  const int64_t chunk = (rows + chunks - 1) / chunks;
  std::vector<int64_t> tables((chunks - 1) * k);
  // Cursors stop at the end of what they filled: the last chunk's are the ends of the groups, which is offsets.
  const auto cursors = [&](int64_t c) { return c + 1 < chunks ? tables.data() + c * k : ends + 1; };
  std::fill(ends, ends + k + 1, 0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) cpu.count(from, c * chunk, std::min(rows, (c + 1) * chunk), k, cursors(c));
  });
  int64_t slot = 0;
  for (int64_t g = 0; g < k; ++g)
    for (int64_t c = 0; c < chunks; ++c) {
      int64_t& cursor = cursors(c)[g];
      slot += std::exchange(cursor, slot);
    }
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      cpu.place(from, c * chunk, std::min(rows, (c + 1) * chunk), k, cursors(c), to);
  });
  std::fill(to + slot, to + rows, -1);
  return {members, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_group); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("group", TORCH_BOX(&group)); }

}  // namespace vtok
