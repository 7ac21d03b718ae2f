#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "density_cluster/density_cluster_cpu.inc"

namespace vtok {

void check_density_cluster(const Tensor& rows, const Tensor& cu_seqlens, const Tensor& cu_k, int64_t k,
                           int64_t neighbours, const std::optional<Tensor>& valid) {
  const char* op = "density_cluster";
  expect_dim(op, "rows", rows, 2, "(S, D)");
  expect_float(op, "rows", rows);
  expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, rows);
  expect_index(op, "cu_k", cu_k, rows, "(V+1,)");
  VTOK_EXPECT(cu_k.size(0) == cu_seqlens.size(0), op, text("cu_k of shape (V+1,)=", shape_text(cu_seqlens)),
              shape_text(cu_k));
  VTOK_EXPECT(k >= 0, op, "k >= 0", k);
  VTOK_EXPECT(neighbours >= 1 && neighbours <= kMostNeighbours, op, text("neighbours in [1, ", kMostNeighbours, "]"),
              neighbours);
  if (!valid) return;
  expect_dim(op, "valid", *valid, 1, "(S,)");
  VTOK_EXPECT(valid->size(0) == rows.size(0), op, text("valid of shape (S,)=(", rows.size(0), ",)"),
              shape_text(*valid));
  expect_dtype(op, "valid", *valid, ScalarType::Bool);
  expect_same_device(op, "valid", *valid, rows);
}

namespace {

const ClusterEntries& entries(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return density_cluster_cpu().f32;
    case ScalarType::Half: return density_cluster_cpu().f16;
    case ScalarType::BFloat16: return density_cluster_cpu().bf16;
    default: return density_cluster_cpu().f64;
  }
}

// Some rows of one group, in a list.
struct Span {
  const int64_t* rows;
  int64_t count;
};

// Cuts the rows into tiles of about equal size.
void add_tiles(std::vector<ClusterTile>& tiles, Span rows, Span others, int64_t slot, float farthest) {
  const int64_t parts = (rows.count + kClusterRows - 1) / kClusterRows;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t begin = rows.count * p / parts, end = rows.count * (p + 1) / parts;
    tiles.push_back({rows.rows + begin, end - begin, others.rows, others.count, slot, farthest});
  }
}

void run(ClusterStep step, const ClusterCall& call, std::vector<ClusterTile>& tiles) {
  torch::stable::parallel_for(0, static_cast<int64_t>(tiles.size()), 1,
                              [&](int64_t begin, int64_t end) { step(call, tiles.data() + begin, end - begin); });
}

// The rows that take part and those with a denser row farther away than their nearest, group by group.
struct Lists {
  std::vector<int64_t> members, first_member, peaks;
  Span group(int64_t v) const { return {members.data() + first_member[v], first_member[v + 1] - first_member[v]}; }
};

Lists members_of(const int64_t* cu, int64_t groups, const bool* valid) {
  Lists lists;
  lists.members.reserve(cu[groups]);
  lists.first_member.push_back(0);
  for (int64_t v = 0; v < groups; ++v) {
    for (int64_t s = cu[v]; s < cu[v + 1]; ++s)
      if (!valid || valid[s]) lists.members.push_back(s);
    lists.first_member.push_back(static_cast<int64_t>(lists.members.size()));
  }
  lists.peaks.reserve(lists.members.size());  // tiles point into it
  return lists;
}

void find_densities(const ClusterEntries& entry, const ClusterCall& call, Lists& lists) {
  const int64_t groups = static_cast<int64_t>(lists.first_member.size()) - 1;
  const ClusterRows& known = call.known;
  std::vector<ClusterTile> tiles, peaks;
  for (int64_t v = 0; v < groups; ++v) add_tiles(tiles, lists.group(v), lists.group(v), 0, 0);
  run(entry.density, call, tiles);
  auto tile = tiles.begin();
  for (int64_t v = 0; v < groups; ++v) {
    const Span group = lists.group(v);
    float farthest = 0;
    for (; tile != tiles.end() && tile->others == group.rows && group.count; ++tile)
      farthest = std::max(farthest, tile->farthest);
    const int64_t* const first = lists.peaks.data() + lists.peaks.size();
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t row = group.rows[i], other = known.neighbour[row];
      if (other < 0 || !denser(known.mean[other], other, known.mean[row], row)) lists.peaks.push_back(row);
    }
    add_tiles(peaks, {first, lists.peaks.data() + lists.peaks.size() - first}, group, 0, farthest);
  }
  run(entry.delta, call, peaks);
}

// Whether row a comes before row b: by descending score, NaN last, then by index.
bool better(const float* score, int64_t a, int64_t b) {
  const bool known_a = score[a] == score[a], known_b = score[b] == score[b];
  if (known_a != known_b) return known_a;
  if (known_a && score[a] != score[b]) return score[a] > score[b];
  return a < b;
}

// The best rows of a group, ascending, into `wanted` slots or as many as there are; what is left over stays as it is.
int64_t choose(Span group, const float* score, int64_t wanted, int64_t slots, int64_t* to) {
  std::vector<int64_t> order(group.rows, group.rows + group.count);
  const int64_t taken = std::min(wanted, group.count);
  std::nth_element(order.begin(), order.begin() + taken, order.end(),
                   [&](int64_t a, int64_t b) { return better(score, a, b); });
  std::sort(order.begin(), order.begin() + taken);
  std::copy_n(order.begin(), std::min(taken, slots), to);
  return std::min(taken, slots);
}

std::tuple<Tensor, Tensor, Tensor> density_cluster(const Tensor& rows, const Tensor& cu_seqlens, const Tensor& cu_k,
                                                   int64_t k, int64_t neighbours, const std::optional<Tensor>& valid) {
  check_density_cluster(rows, cu_seqlens, cu_k, k, neighbours, valid);
  const int64_t count = rows.size(0), groups = cu_k.size(0) - 1, D = rows.size(1);
  expect_ascending("density_cluster", "cu_seqlens", cu_seqlens, count, "S");
  expect_ascending("density_cluster", "cu_k", cu_k);
  const Tensor source = dense_rows(rows), bounds = torch::stable::contiguous(cu_seqlens),
               slots = torch::stable::contiguous(cu_k), mask = valid ? torch::stable::contiguous(*valid) : rows;
  Tensor assignment = empty(cu_seqlens, {count}, ScalarType::Long), centres = empty(cu_k, {k}, ScalarType::Long);
  Tensor scores = empty(rows, {count}, ScalarType::Float);
  auto *const assigned = mutable_indices(assignment), *const chosen = mutable_indices(centres);
  auto* const score = static_cast<float*>(scores.mutable_data_ptr());
  std::fill(assigned, assigned + count, -1);
  std::fill(chosen, chosen + k, -1);
  std::fill(score, score + count, -std::numeric_limits<float>::infinity());

  Lists lists = members_of(indices(bounds), groups, valid ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr);
  std::vector<float> mean(count), nearest(count);
  std::vector<int64_t> neighbour(count);
  const ClusterCall call{source.const_data_ptr(), source.stride(0), D, neighbours,
                         {mean.data(), nearest.data(), neighbour.data()}, assigned};
  const ClusterEntries& entry = entries(rows.scalar_type());
  find_densities(entry, call, lists);
  for (const int64_t row : lists.members) score[row] = cluster_score(mean[row], nearest[row], D);
  std::vector<ClusterTile> tiles;
  for (int64_t v = 0; v < groups; ++v) {
    const int64_t *ck = indices(slots) + v, slot = std::min(ck[0], k), end = std::min(ck[1], k);
    const int64_t found = choose(lists.group(v), score, ck[1] - ck[0], end - slot, chosen + slot);
    if (found) add_tiles(tiles, lists.group(v), {chosen + slot, found}, slot, 0);
  }
  run(entry.assign, call, tiles);
  return {assignment, centres, scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_density_cluster); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("density_cluster", TORCH_BOX(&density_cluster)); }

}  // namespace vtok
