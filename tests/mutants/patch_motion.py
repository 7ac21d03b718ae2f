from mutant import Mutant

MUTANTS = [
    Mutant(
        "columns are added from the right", "csrc/common/patch_cpu.h",
        "total = total + column[k];", "total = total + column[each - k];",
    ),
    Mutant(
        "sums of bytes never settle", "csrc/common/patch_cpu.h",
        "constexpr int64_t kPatchRows = 128;", "constexpr int64_t kPatchRows = 1 << 20;",
    ),
    Mutant(
        "pairs of columns stay apart", "csrc/common/patch_terms.h",
        "(I / 2 + I % 2 * kLanes)...", "I...",
    ),
    Mutant(
        "the means of pairs stay together", "csrc/common/patch_terms.h",
        "(2 * I)...", "I...",
    ),
    Mutant(
        "the second row meets the first of the reference", "csrc/common/patch_cpu.h",
        "add_row(x + y * x_row, r + y * r_row,", "add_row(x + y * x_row, r + 0 * r_row,",
    ),
    Mutant(
        "one buffer serves for two", "csrc/common/patch.cuh", "    buffer ^= 1;\n", "",
    ),
    Mutant(
        "the step before stays in shared memory", "csrc/common/patch.cuh",
        "if (keep) store_rows(", "if (keep && y) store_rows(",
    ),
    Mutant(
        "a step is compared with itself", "triton_kernels/patch_motion.py", "tl.maximum(t - 1, 0)", "t",
    ),
]  # fmt: skip
