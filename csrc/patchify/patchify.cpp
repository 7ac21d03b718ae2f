#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "common/stable.h"
#include "patchify/patchify_call.h"
#include "patchify/patchify_cpu.inc"

namespace vtok {
namespace {

constexpr const char* kOp = "patchify";

std::string list_text(const std::vector<int64_t>& values) {
  std::ostringstream out;
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "[") << values[i];
  out << (values.empty() ? "[]" : "]");
  return out.str();
}

void check_channel_values(const char* name, const std::optional<std::vector<double>>& values, int64_t channels,
                          bool positive) {
  if (!values) return;
  VTOK_EXPECT(channels <= kPatchifyChannels, kOp, text("C of at most ", kPatchifyChannels, " with ", name),
              text("C=", channels));
  VTOK_EXPECT(static_cast<int64_t>(values->size()) == channels, kOp, text(name, " of C=", channels, " values"),
              values->size());
  for (int64_t c = 0; c < channels; ++c)
    VTOK_EXPECT(std::isfinite((*values)[c]) && (!positive || (*values)[c] > 0), kOp,
                text(name, positive ? " finite and > 0" : " finite"), text(name, "[", c, "]=", (*values)[c]));
}

void check(const Tensor& frames, const Tensor& index, const std::vector<int64_t>& patch, int64_t tubelet,
           const std::optional<Tensor>& reference_index, const std::optional<Tensor>& vectors,
           const PatchifyOptions& options) {
  const ScalarType type = frames.scalar_type();
  expect_dim(kOp, "frames", frames, 5, "(B, T, C, H, W)");
  VTOK_EXPECT(type == ScalarType::Byte || is_float(type), kOp,
              "frames of dtype uint8, float32, float16, bfloat16 or float64", dtype_name(type));
  expect_index(kOp, "index", index, frames, "(K,)");
  if (reference_index) {
    expect_index(kOp, "reference_index", *reference_index, frames, "(K,)");
    VTOK_EXPECT(reference_index->size(0) == index.size(0), kOp,
                text("reference_index of shape (K,)=(", index.size(0), ",)"), shape_text(*reference_index));
  }
  if (vectors) {
    VTOK_EXPECT(reference_index.has_value(), kOp, "vectors with a reference_index", "none");
    expect_dtype(kOp, "vectors", *vectors, ScalarType::Long);
    VTOK_EXPECT(vectors->dim() == 2 && vectors->size(0) == index.size(0) && vectors->size(1) == 2, kOp,
                text("vectors of shape (K, 2)=(", index.size(0), ", 2)"), shape_text(*vectors));
    expect_same_device(kOp, "vectors", *vectors, frames);
  }
  VTOK_EXPECT(patch.size() == 2 && patch[0] >= 1 && patch[1] >= 1, kOp, "patch as two sizes >= 1", list_text(patch));
  VTOK_EXPECT(tubelet >= 1, kOp, "tubelet >= 1", tubelet);
  const int64_t T = frames.size(1), C = frames.size(2), H = frames.size(3), W = frames.size(4);
  VTOK_EXPECT(T % tubelet == 0, kOp, text("T divisible by tubelet=", tubelet), text("T=", T));
  VTOK_EXPECT(options.pad || (H % patch[0] == 0 && W % patch[1] == 0), kOp,
              text("H and W divisible by patch=", list_text(patch), " without pad"), text("H=", H, " and W=", W));
  VTOK_EXPECT(options.order == "cthw" || options.order == "thwc", kOp, "order of \"cthw\" or \"thwc\"",
              text('"', options.order, '"'));
  check_channel_values("mean", options.mean, C, false);
  check_channel_values("std", options.std, C, true);
  if (!options.dtype) return;
  const bool is_double = type == ScalarType::Double, to_double = *options.dtype == ScalarType::Double;
  VTOK_EXPECT(is_float(*options.dtype) && is_double == to_double, kOp,
              text("dtype of ", is_double ? "float64 for float64 frames" : "float32, float16 or bfloat16"),
              dtype_name(*options.dtype));
}

}  // namespace

PatchifyCall::PatchifyCall(const Tensor& frames, const Tensor& index, const std::vector<int64_t>& patch,
                           int64_t tubelet, const std::optional<Tensor>& reference_index,
                           const std::optional<Tensor>& vectors, const PatchifyOptions& options)
    : sites(torch::stable::contiguous(index)),
      references(reference_index ? torch::stable::contiguous(*reference_index) : sites),
      moves(vectors ? torch::stable::contiguous(*vectors) : sites),
      referring(reference_index.has_value()),
      moving(vectors.has_value()) {
  check(frames, index, patch, tubelet, reference_index, vectors, options);
  int64_t sizes[5], strides[5];
  for (int64_t d = 0; d < 5; ++d) sizes[d] = frames.size(d), strides[d] = frames.stride(d);
  grid = patch_grid(sizes, strides, patch[0], patch[1], tubelet);
  const bool bytes = frames.scalar_type() == ScalarType::Byte;
  const size_t channels = options.mean ? options.mean->size() : options.std ? options.std->size() : 1;
  for (size_t c = 0; c < channels; ++c) {
    const double std = options.std ? (*options.std)[c] : 1.0;
    scale.push_back(1 / ((bytes ? 255 : 1) * std));
    shift.push_back(options.mean ? (*options.mean)[c] / std : 0.0);
  }
  out = empty(frames, {index.size(0), patch_values(grid)},
              options.dtype ? *options.dtype
              : bytes       ? ScalarType::Float
                            : frames.scalar_type());
}

namespace {

PatchifyRows rows_of(ScalarType from, ScalarType to) {
  const PatchifyCpu& cpu = patchify_cpu();
  const int place = to == ScalarType::Float ? 0 : to == ScalarType::Half ? 1 : 2;
  switch (from) {
    case ScalarType::Byte: return cpu.u8[place];
    case ScalarType::Float: return cpu.f32[place];
    case ScalarType::Half: return cpu.f16[place];
    case ScalarType::BFloat16: return cpu.bf16[place];
    default: return cpu.f64;
  }
}

Tensor patchify(const Tensor& frames, const Tensor& index, const std::vector<int64_t>& patch, int64_t tubelet,
                const std::optional<Tensor>& reference_index, const std::optional<Tensor>& vectors,
                const std::optional<std::vector<double>>& mean, const std::optional<std::vector<double>>& std,
                const std::optional<ScalarType>& dtype, const StringArg& order, bool pad) {
  PatchifyCall call(frames, index, patch, tubelet, reference_index, vectors, {mean, std, dtype, order, pad});
  const PatchifyArgs args{frames.const_data_ptr(),
                          call.grid,
                          indices(call.sites),
                          call.referring ? indices(call.references) : nullptr,
                          call.moving ? indices(call.moves) : nullptr,
                          call.scale.data(),
                          call.shift.data(),
                          call.scale.size() > 1,
                          order == "thwc",
                          call.out.mutable_data_ptr()};
  const PatchifyRows rows = rows_of(frames.scalar_type(), call.out.scalar_type());
  std::atomic<int64_t> bad{0}, bad_references{0};
  torch::stable::parallel_for(0, index.size(0), grain(patch_values(call.grid) * 4), [&](int64_t begin, int64_t end) {
    bad += patchify_cpu().outside(args.index, patch_sites(args.grid), begin, end);
    if (args.reference) bad_references += patchify_cpu().outside(args.reference, patch_sites(args.grid), begin, end);
    rows(args, begin, end);
  });
  expect_all_in_range(kOp, "index", bad, patch_sites(call.grid));
  expect_all_in_range(kOp, "reference_index", bad_references, patch_sites(call.grid));
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vtok, m) { m.def(VTOK_SCHEMA_patchify); }
STABLE_TORCH_LIBRARY_IMPL(vtok, CPU, m) { m.impl("patchify", TORCH_BOX(&patchify)); }

}  // namespace vtok
