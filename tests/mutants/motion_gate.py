from mutant import Mutant

MUTANTS = [
    Mutant(
        "a patch that is not kept becomes the reference", "csrc/motion_gate/motion_gate_cpu.inc",
        "if (keep[p] || gate.previous) last[p] = t;", "last[p] = t;",
    ),
    Mutant(
        "refresh counts from the chunk's first step", "csrc/motion_gate/motion_gate.h",
        "(seen + t) % gate.refresh == 0", "t % gate.refresh == 0",
    ),
    Mutant(
        "what was decided is read without a barrier", "csrc/motion_gate/motion_gate.cuh",
        "    __syncthreads();\n    if (first < width", "    if (first < width",
    ),
    Mutant(
        "the threshold itself passes", "triton_kernels/motion_gate.py",
        "(distance > threshold)", "(distance >= threshold)",
    ),
]  # fmt: skip
