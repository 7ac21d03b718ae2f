from mutant import Mutant

MUTANTS = [
    Mutant(
        "lanes are folded in another order", "csrc/common/canonical.h",
        "return (x[0] + x[2]) + (x[1] + x[3]);", "return (x[0] + x[1]) + (x[2] + x[3]);",
    ),
    Mutant(
        "product and sum are contracted", "csrc/common/canonical.cuh",
        "A (&sums)[2]) {\n    sums[0] = add_rn(sums[0], mul_rn(a, b));",
        "A (&sums)[2]) {\n    sums[0] = static_cast<A>(fma(a, b, sums[0]));",
    ),
    Mutant(
        "lanes are folded from the near end", "csrc/common/canonical.cuh",
        "for (int h = kWarp / 2; h; h /= 2) {\n    lanes.x", "for (int h = 1; h < kWarp; h *= 2) {\n    lanes.x",
    ),
    Mutant("the root of each norm is taken", "csrc/common/canonical.cuh",
           "sqrt_rn(mul_rn(norm_a, norm_b))", "mul_rn(sqrt_rn(norm_a), sqrt_rn(norm_b))"),
    Mutant("one buffer serves for two", "csrc/temporal_similarity/temporal_similarity.cuh", "buffer ^= 1;", ""),
    Mutant("a video looks into the one before", "triton_kernels/temporal_similarity.py",
           "(before >= tl.maximum(first, 0))", "(before >= 0)"),
]  # fmt: skip
