#include <atomic>

#include "common/stable.h"
#include "pack/pack_cpu.inc"

namespace vtok {

void check_pack(const Tensor& tokens, const Tensor& index) {
  expect_dim("pack", "tokens", tokens, 2, "(S, D)");
  expect_index("pack", "index", index, tokens, "(K,)");
}

namespace {

Tensor pack(const Tensor& tokens, const Tensor& index) {
  check_pack(tokens, index);
  const int64_t rows = tokens.size(0), count = index.size(0);
  const Tensor source = dense_rows(tokens), order = torch::stable::contiguous(index);
  Tensor out = empty(tokens, {count, tokens.size(1)}, tokens.scalar_type());
  const int64_t bytes = tokens.size(1) * static_cast<int64_t>(tokens.element_size());
  if (bytes == 0) return out;
  const int64_t stride = source.stride(0) * static_cast<int64_t>(tokens.element_size());
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  std::atomic<int64_t> bad{0};
  torch::stable::parallel_for(0, count, grain(bytes), [&](int64_t begin, int64_t end) {
    bad += pack_cpu().rows(from, rows, stride, bytes, indices(order), to, begin, end);
  });
  expect_all_in_range("pack", "index", bad, rows);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_pack); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("pack", TORCH_BOX(&pack)); }

}  // namespace vtok
