from mutant import Mutant

MUTANTS = [
    Mutant(
        "columns are added from the right", "csrc/common/patch_cpu.h",
        "columns.sums[s][p * pw + k]", "columns.sums[s][p * pw + each - 1 - k]",
    ),
    Mutant(
        "sums of bytes never settle", "csrc/common/patch_cpu.h",
        "constexpr int64_t kPatchRows = 128;", "constexpr int64_t kPatchRows = 1 << 20;",
    ),
    Mutant(
        "one buffer serves for two", "csrc/common/patch.cuh", "    buffer ^= 1;\n", "",
    ),
    Mutant(
        "the step before stays in shared memory", "csrc/common/patch.cuh",
        "if (keep && y + i < rows)", "if (keep && y + i + 1 < rows)",
    ),
    Mutant(
        "columns beyond a patch count", "triton_kernels/_patch.py",
        "inside = (k + lane < left) & (k + lane < pw)\n        s = down_rows(", "inside = k + lane < left\n        s = down_rows(",
    ),
]  # fmt: skip
