from mutant import Mutant

MUTANTS = [
    Mutant(
        "rows of a group change places", "csrc/group/group.cuh",
        "lower = peers & ((1u << lane) - 1);", "lower = peers & ~((2u << lane) - 1);",
    ),
    Mutant(
        "a barrier is dropped", "csrc/group/group.cuh",
        "  if (digit == 0) shared.first[kGroupThreads] = total;\n  __syncthreads();",
        "  if (digit == 0) shared.first[kGroupThreads] = total;",
    ),
    Mutant("a group k is let through", "csrc/group/group.cuh", "g >= 0 && g < plan.k;", "g >= 0 && g <= plan.k;"),
    Mutant("the -1 tail is missing", "csrc/group/group.cuh", "members[g] = -1;", "members[g] = members[g];"),
    Mutant(
        "rows are placed backwards", "csrc/group/group_cpu.inc",
        "int64_t* cursors, int64_t* members) {\n  for (int64_t s = begin; s < end; ++s)",
        "int64_t* cursors, int64_t* members) {\n  for (int64_t s = end - 1; s >= begin; --s)",
    ),
]  # fmt: skip
