// From tensors to a search: the same checks and outputs on every device.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "common/patch_check.h"
#include "motion_search/motion_search.h"

namespace vtok {

struct SearchTensors {
  Tensor source, motion, vectors;
  MotionSearch search;
};

inline PatchVideo expect_search(const Tensor& frames, const std::vector<int64_t>& patch, int64_t radius,
                                int64_t tubelet, const std::string& metric, const std::string& span, double bias,
                                bool pad) {
  const char* op = "motion_search";
  VTOK_EXPECT(metric == "l1" || metric == "mse" || metric == "l2", op, "metric of \"l1\", \"mse\" or \"l2\"",
              text('"', metric, '"'));
  const PatchVideo video = expect_patches(op, frames, patch, tubelet, metric, span, pad);
  VTOK_EXPECT(radius >= 0, op, "radius >= 0", radius);
  VTOK_EXPECT(std::isfinite(bias) && bias >= 0, op, "bias finite and >= 0", bias);
  return video;
}

inline SearchTensors prepare_search(const Tensor& frames, PatchVideo video, int64_t radius, double bias) {
  const Tensor source = dense_pixels(frames);
  set_pixels(video, source);
  const Tensor motion = empty(frames, {video.videos, video.steps, video.h, video.w}, score_type(frames));
  const Tensor vectors = empty(frames, {video.videos, video.steps, video.h, video.w, 2}, ScalarType::Long);
  if (score_type(frames) == ScalarType::Float) bias = std::min<double>(bias, std::numeric_limits<float>::max());
  return {source,
          motion,
          vectors,
          {video, std::min(radius, video.H - 1), std::min(radius, video.W - 1), bias, motion.mutable_data_ptr(),
           mutable_indices(vectors)}};
}

}  // namespace vtok
