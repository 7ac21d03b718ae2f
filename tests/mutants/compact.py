from mutant import Mutant

MUTANTS = [
    Mutant("the -1 tail is missing", "csrc/compact/compact.cuh", "    index[i] = -1;", "    index[i] = index[i];"),
    Mutant(
        "a barrier is dropped", "csrc/compact/compact.cuh",
        "    __syncthreads();\n    for (int64_t j = thread; j < kept", "    for (int64_t j = thread; j < kept",
    ),
    Mutant(
        "a video's last row is counted for the next", "csrc/compact/compact.cuh",
        "((2u << last % kCompactRows) - 1)", "((1u << last % kCompactRows) - 1)",
    ),
    Mutant("a row beyond the capacity is written", "csrc/compact/compact.cuh",
           "slot + j < capacity; j +=", "slot + j <= capacity; j +=", sanitize=True),
    Mutant("a byte counts to 256", "csrc/compact/compact_cpu.inc", "step < 255", "step < 256"),
]  # fmt: skip
