// What the CPU's and CUDA's halves share on the torch side: a checked call.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/stable.h"
#include "patchify/patchify.h"

namespace vtok {

struct PatchifyOptions {
  const std::optional<std::vector<double>>&mean, &std;
  const std::optional<ScalarType>& dtype;
  const std::string& order;
  bool pad;
};

struct PatchifyCall {
  Tensor sites, references, moves;  // index, reference_index and vectors, dense
  bool referring, moving;           // else there is no reference_index, or there are no vectors
  PatchGrid grid;
  std::vector<double> scale, shift;  // of each channel, or one of all
  Tensor out;                        // not yet written

  // Checks every argument, then computes the above.
  PatchifyCall(const Tensor& frames, const Tensor& index, const std::vector<int64_t>& patch, int64_t tubelet,
               const std::optional<Tensor>& reference_index, const std::optional<Tensor>& vectors,
               const PatchifyOptions& options);
};

}  // namespace vtok
