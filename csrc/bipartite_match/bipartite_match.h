// Which rows of a segment look and which receive; for the CPU's kernels and CUDA's alike.
#pragma once

#include "common/half.h"

namespace vtok {

// Row i of a segment receives where i % split == split - 1, else it looks; the first `guarded` rows do neither.
struct MatchRule {
  int64_t split, guarded;
};

VTOK_BOTH int64_t destinations_in(const MatchRule& rule, int64_t rows) { return rows / rule.split; }
VTOK_BOTH int64_t sources_in(const MatchRule& rule, int64_t rows) { return rows - rows / rule.split; }

// The row of a destination or a source by its number among them, the guarded ones counted.
VTOK_BOTH int64_t destination_row(const MatchRule& rule, int64_t number) {
  return number * rule.split + rule.split - 1;
}
VTOK_BOTH int64_t source_row(const MatchRule& rule, int64_t number) { return number + number / (rule.split - 1); }

}  // namespace vtok
