from mutant import Mutant

MUTANTS = [
    Mutant("one row too many is written", "csrc/pack/pack.cuh", "if (k >= count)", "if (k > count)", sanitize=True),
    Mutant(
        "a block of rows is left out", "csrc/pack/pack.cuh",
        "dim3(ceil_div(count, kPackWarps))", "dim3(count / kPackWarps + 1 - (count > kPackWarps))",
    ),
    Mutant(
        "the row of zeros is not written", "csrc/pack/pack.cuh",
        "to[w] = inside ? from[w] : Word{};", "if (inside) to[w] = from[w];",
    ),
    Mutant("rows of odd width are copied as words", "csrc/pack/pack.cuh", "alignment % 4 == 0", "alignment % 2 == 0"),
    Mutant("the last row counts as outside", "csrc/pack/pack_cpu.inc", "row < rows", "row < rows - 1"),
    Mutant("an index below -1 is let through", "csrc/pack/pack_cpu.inc", "bad += row != -1", "bad += row > -1"),
    Mutant("the row stride is taken for the width", "csrc/pack/pack.cpp", "source.stride(0) *", "tokens.size(1) *"),
    Mutant("-1 reads row 0", "triton_kernels/pack.py", "mask=inside[:, None] & (d < D)", "mask=(d < D)"),
]  # fmt: skip
