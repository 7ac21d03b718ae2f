from mutant import Mutant

MUTANTS = [
    Mutant(
        "a barrier is dropped", "csrc/topk/topk_block.cuh",
        "  __syncthreads();\n  return scratch.choice;", "  return scratch.choice;",
    ),
    Mutant(
        "ties go to the later rows of a warp", "csrc/topk/topk_block.cuh",
        "equal + __popc(same & lower), taken", "equal + __popc(same & ~lower) - 1, taken",
    ),
    Mutant(
        "a slot beyond k is written", "csrc/topk/topk_block.cuh",
        "chosen && slot <", "chosen && slot <=",
    ),
    Mutant(
        "the -1 tail is missing", "csrc/topk/topk.cuh",
        "  topk_pad_tail(p);\n  if (blockIdx.x >= p.segments) return;", "  if (blockIdx.x >= p.segments) return;",
    ),
    Mutant(
        "a tile does not wait for the tiles before it", "csrc/topk/topk.cuh",
        "while (!((seen = *sum) & kTopkCounted)) spin_yield();", "seen = *sum | kTopkCounted;",
    ),
    Mutant(
        "-0 is less than +0", "csrc/topk/topk_cpu.inc",
        "const uint32_t key = bits > 0x80000000u", "const uint32_t key = bits >= 0x80000000u",
    ),
    Mutant(
        "one tie too many is taken", "csrc/topk/topk_cpu.inc",
        "found + 1);\n  return found;", "found);\n  return found;",
    ),
    Mutant(
        "one tie too few is taken", "triton_kernels/topk.py",
        "(tl.cumsum(same.to(tl.int32)) <= left)", "(tl.cumsum(same.to(tl.int32)) < left)",
    ),
]  # fmt: skip
