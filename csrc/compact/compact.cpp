#include <algorithm>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "compact/compact_cpu.inc"

namespace vtok {

void check_compact(const Tensor& keep, const Tensor& cu_seqlens, int64_t capacity) {
  expect_dim("compact", "keep", keep, 1, "(S,)");
  expect_dtype("compact", "keep", keep, ScalarType::Bool);
  expect_cu_seqlens("compact", "cu_seqlens", cu_seqlens, keep);
  VTOK_EXPECT(capacity >= 0, "compact", "capacity >= 0", capacity);
}

namespace {

constexpr int64_t kChunk = 16384;  // rows a thread counts and lists at a time

std::tuple<Tensor, Tensor> compact(const Tensor& keep, const Tensor& cu_seqlens, int64_t capacity) {
  check_compact(keep, cu_seqlens, capacity);
  expect_ascending("compact", "cu_seqlens", cu_seqlens, keep.size(0), "S");
  const int64_t videos = cu_seqlens.size(0) - 1;
  const Tensor mask = torch::stable::contiguous(keep), bounds = torch::stable::contiguous(cu_seqlens);
  Tensor index = empty(cu_seqlens, {capacity}, ScalarType::Long);
  Tensor counts = empty(cu_seqlens, {videos}, ScalarType::Long);
  const auto* bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
  const int64_t* cu = indices(bounds);
  int64_t *out = mutable_indices(index), *kept = mutable_indices(counts);
  const CompactCpu& cpu = compact_cpu();

  const int64_t rows = cu[videos], chunks = (rows + kChunk - 1) / kChunk;
  std::vector<int64_t> start(chunks + 1);  // slot of each chunk's first kept row
  torch::stable::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) start[c + 1] = cpu.count(bytes, c * kChunk, std::min(rows, (c + 1) * kChunk));
  });
  for (int64_t c = 0; c < chunks; ++c) start[c + 1] += start[c];
  for (int64_t& slot : start) slot = std::min(slot, capacity);
  torch::stable::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      cpu.list(bytes, c * kChunk, std::min(rows, (c + 1) * kChunk), out + start[c], start[c + 1] - start[c]);
  });
  std::fill(out + start[chunks], out + capacity, -1);
  torch::stable::parallel_for(0, videos, grain(rows / std::max<int64_t>(videos, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) kept[v] = cpu.count(bytes, cu[v], cu[v + 1]);
  });
  return {index, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_compact); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("compact", TORCH_BOX(&compact)); }

}  // namespace vtok
