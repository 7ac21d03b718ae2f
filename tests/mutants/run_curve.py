from mutant import Mutant

MUTANTS = [
    Mutant(
        "the tiles in shared memory are overwritten while they are read", "csrc/run_curve/run_curve.cuh",
        "dots[i][j]);\n      }\n    }\n    __syncthreads();\n", "dots[i][j]);\n      }\n    }\n",
    ),
    Mutant(
        "a run opens as late as it can", "csrc/run_curve/run_curve.cuh",
        "if (sum < best) best = sum, at = i;", "if (sum <= best) best = sum, at = i;",
    ),
    Mutant(
        "the masks of one run more are read", "csrc/run_curve/run_curve.cuh",
        "old[(at - 1) * words + w] |", "old[at * words + w] |",
    ),
    Mutant(
        "tables and tiles of one site overlap its costs", "csrc/run_curve/run_curve.cuh",
        "grid.triangle = table < tiles ? tiles : table;", "grid.triangle = table < tiles ? table : tiles;",
    ),
    Mutant(
        "lower frames of a word's second half are lost", "csrc/run_curve/run_curve_cpu.inc",
        "uint64_t{1} << opens % kCurveWord", "uint64_t{1} << opens % (kCurveWord / 2)",
    ),
    Mutant(
        "weights count once in the square of a run's sum", "csrc/run_curve/run_curve_cpu.inc",
        "work.product(i, j) * own * weight_of(site, j);", "work.product(i, j) * own;",
    ),
    Mutant(
        "the columns after the last whole vector are left as they were", "csrc/run_curve/run_curve_cpu.inc",
        "i < width || i % kLanes; ++i) to[i] = 0;", "i < width || i % 2; ++i) to[i] = 0;",
    ),
    Mutant(
        "collinear points are corners of the hull", "csrc/run_curve/run_curve.h",
        "- points[k]) * (b - a)) break;", "- points[k]) * (b - a) - 1) break;",
    ),
    Mutant(
        "an infinite site is cut like any other", "triton_kernels/run_curve.py",
        "real = finite & (j > i)", "real = (j > i)",
    ),
]  # fmt: skip
