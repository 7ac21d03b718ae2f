from mutant import Mutant

MUTANTS = [
    Mutant("a tie joins", "csrc/temporal_gate/temporal_gate_cpu.inc",
           "similarity > static_cast<A>(video.threshold)", "similarity >= static_cast<A>(video.threshold)"),
    Mutant("a refresh counts from the chunk's start", "csrc/temporal_gate/temporal_gate.cuh",
           "if (args.refresh > 0) out.phase = step % args.refresh;", "if (args.refresh > 0) out.phase = 0;"),
    Mutant("the decision is read before it is made", "csrc/temporal_gate/temporal_gate.cuh",
           "        __syncthreads();\n      }\n      A similarity", "      }\n      A similarity"),
    Mutant("a run's mean is its sum", "triton_kernels/temporal_gate.py",
           "a = div_rn(a, tl.where(known, weight, 1).to(ACC)[:, None])", "a = a + 0"),
]  # fmt: skip
