from mutant import Mutant

MUTANTS = [
    Mutant("a group of one is left out", "csrc/merge/merge.cuh", "place < end; place +=", "place + 1 < end; place +="),
    Mutant("the product is not rounded", "csrc/merge/merge.cuh", "add_rn(sum, mul_rn(w, x))", "fma(w, x, sum)"),
    Mutant("a maximum loses NaN", "csrc/merge/merge.cuh", "x > sum || x != x ? x", "x > sum ? x"),
    Mutant("the next row is written", "csrc/merge/merge.cuh", "if (!mine) return;", "", sanitize=True),
    Mutant("the last group is left out", "csrc/merge/merge.cpp", "high = args.groups;", "high = args.groups - 1;"),
    Mutant("a batch starts again", "csrc/merge/merge_cpu.inc", "batch.first = taken == 0", "batch.first = true"),
    Mutant("the last of equals wins", "csrc/merge/merge_cpu.inc", "(x[i] > sum[i])", "(x[i] >= sum[i])"),
    Mutant("the last column is lost", "csrc/merge/merge_cpu.inc", "if (c < end) reduce", "if (c + 1 < end) reduce"),
    Mutant("members in another order", "triton_kernels/merge.py", "place = start + i", "place = start + AHEAD - 1 - i"),
    Mutant("every maximum has the gradient", "vtok/ops/merge.py", "return same & (rank ==", "return same & (rank <="),
]  # fmt: skip
