from mutant import Mutant

HEADER, CPU = "csrc/motion_search/motion_search.h", "csrc/motion_search/motion_search_cpu.inc"
CUDA = "csrc/motion_search/motion_search.cuh"

MUTANTS = [
    Mutant(
        "lanes prefer their own", CUDA, "(other == best && other_rank < rank)", "(other == best && other_rank > rank)"
    ),
    Mutant("the bias is forgotten", HEADER, "best + bias < still", "best + 0 * bias < still"),
    Mutant("a block may lie half outside", HEADER, "at + part + by <= size", "at + 0 * part + by < size"),
    Mutant("NaN wins", HEADER, "a < b || (b != b && a == a)", "!(a >= b)"),
    Mutant("vectors to the right are left out", CPU, " || (dx > 0 && !attempt(dy, dx))", ""),
    Mutant("a patch drops out too early", CPU, "&& best[p] != 0", "&& !(best[p] <= bias)"),
    Mutant(
        "the window is one row short", CUDA,
        "video.ph + 2 * search.ry, stage", "video.ph + 2 * search.ry - 1, stage",
    ),
    Mutant("the barrier is dropped", CUDA, "    __syncthreads();\n", ""),
    Mutant(
        "far vectors go first", "triton_kernels/motion_search.py",
        "(norm < far)", "(norm > far)",
    ),
]  # fmt: skip
