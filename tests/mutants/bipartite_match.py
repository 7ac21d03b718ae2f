from mutant import Mutant

MUTANTS = [
    Mutant(
        "the tiles in shared memory are overwritten while they are read", "csrc/common/dot_tiles.cuh",
        "    multiply_tiles(shared, x, y, dots);\n    __syncthreads();\n",
        "    multiply_tiles(shared, x, y, dots);\n",
    ),
    Mutant(
        "the higher of two equal rows wins", "csrc/bipartite_match/bipartite_match.cuh",
        "| (0xffffffffu - static_cast<uint32_t>(row));", "| static_cast<uint32_t>(row);",
    ),
    Mutant(
        "a segment has no room for its last tile", "csrc/common/dot_tiles.cuh",
        "return segment_begin(of, v) / of.span + v;", "return segment_begin(of, v) / of.span;",
    ),
    Mutant(
        "NaN beats numbers", "csrc/bipartite_match/bipartite_match.cuh",
        "cosine != cosine ? 0u :", "cosine != cosine ? 0xffffffffu :",
    ),
    Mutant(
        "the last of equals wins", "csrc/bipartite_match/bipartite_match_cpu.inc",
        "~(vword)(cosine <= found.best) & real", "~(vword)(cosine < found.best) & real",
    ),
    Mutant(
        "the columns after the last whole vector are left as they were",
        "csrc/common/dot_tiles.h", "i % kLanes; ++i) to[i] = 0;", "i % 2; ++i) to[i] = 0;",
    ),
    Mutant(
        "a protected row receives", "triton_kernels/bipartite_match.py",
        "for first in range(guarded // split, size", "for first in range(0, size",
    ),
]  # fmt: skip
