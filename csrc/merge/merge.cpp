#include <atomic>
#include <optional>
#include <tuple>

#include "common/stable.h"
#include "merge/merge_cpu.inc"

namespace vtok {

ScalarType merge_accumulator(const Tensor& tokens) {
  return tokens.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_merge(const Tensor& tokens, const Tensor& members, const Tensor& offsets,
                 const std::optional<Tensor>& weights, const std::string& reduce) {
  expect_dim("merge", "tokens", tokens, 2, "(S, D)");
  expect_float("merge", "tokens", tokens);
  expect_index("merge", "members", members, tokens, "(M,)");
  expect_index("merge", "offsets", offsets, tokens, "(K+1,)");
  VTOK_EXPECT(offsets.size(0) >= 1, "merge", "offsets of shape (K+1,)", shape_text(offsets));
  VTOK_EXPECT(reduce == "mean" || reduce == "sum" || reduce == "max", "merge", "reduce to be mean, sum or max", reduce);
  if (!weights) return;
  expect_dim("merge", "weights", *weights, 1, "(S,)");
  VTOK_EXPECT(weights->size(0) == tokens.size(0), "merge", text("weights of shape (S,)=(", tokens.size(0), ",)"),
              shape_text(*weights));
  expect_dtype("merge", "weights", *weights, merge_accumulator(tokens));
  expect_same_device("merge", "weights", *weights, tokens);
}

namespace {

int64_t merge_range(ScalarType type, const MergeArgs& args, int64_t begin, int64_t end) {
  switch (type) {
    case ScalarType::Float: return merge_cpu().f32(args, begin, end);
    case ScalarType::Half: return merge_cpu().f16(args, begin, end);
    case ScalarType::BFloat16: return merge_cpu().bf16(args, begin, end);
    default: return merge_cpu().f64(args, begin, end);
  }
}

// Work is counted in rows read and written, so that threads get equal shares however uneven the groups: group g
// starts at unit offsets[g] + g. The first group at or after a unit.
int64_t group_at(const MergeArgs& args, int64_t unit) {
  int64_t low = 0, high = args.groups;
  while (low < high) {
    const int64_t mid = low + (high - low) / 2;
    if (args.offsets[mid] + mid < unit) low = mid + 1;
    else high = mid;
  }
  return low;
}

std::tuple<Tensor, Tensor> merge(const Tensor& tokens, const Tensor& members, const Tensor& offsets,
                                 const std::optional<Tensor>& weights, const StringArg& reduce) {
  check_merge(tokens, members, offsets, weights, reduce);
  expect_ascending("merge", "offsets", offsets, members.size(0), "M");
  const int64_t groups = offsets.size(0) - 1;
  const Tensor source = dense_rows(tokens), list = torch::stable::contiguous(members);
  const Tensor bounds = torch::stable::contiguous(offsets);
  const Tensor sizes = weights ? torch::stable::contiguous(*weights) : tokens;
  Tensor values = empty(tokens, {groups, tokens.size(1)}, tokens.scalar_type());
  Tensor weight = empty(tokens, {groups}, merge_accumulator(tokens));
  const MergeArgs args{source.const_data_ptr(),
                       tokens.size(0),
                       source.stride(0),
                       tokens.size(1),
                       indices(list),
                       indices(bounds),
                       groups,
                       weights ? sizes.const_data_ptr() : nullptr,
                       values.mutable_data_ptr(),
                       weight.mutable_data_ptr(),
                       reduce == "mean",
                       reduce == "max"};
  const int64_t units = args.offsets[groups] + groups;
  std::atomic<int64_t> bad{0};
  torch::stable::parallel_for(
      0, units, grain(args.width * static_cast<int64_t>(tokens.element_size())), [&](int64_t begin, int64_t end) {
        bad += merge_range(tokens.scalar_type(), args, group_at(args, begin), group_at(args, end));
      });
  expect_all_in_range("merge", "members", bad, args.rows);
  return {values, weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_merge); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("merge", TORCH_BOX(&merge)); }

}  // namespace vtok
