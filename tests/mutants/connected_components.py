from mutant import Mutant

MUTANTS = [
    Mutant(
        "two that join at once lose a link", "csrc/common/union_find.cuh",
        "    if (was == high) return;\n", "    return;\n",
    ),
    Mutant(
        "a label is found and not made lower", "csrc/common/union_find.cuh",
        "label + high), static_cast<long long>(low));", "label + low), static_cast<long long>(low));",
    ),
    Mutant(
        "a node n is let through", "csrc/connected_components/connected_components.cuh",
        "b >= 0 && b < n)", "b >= 0 && b <= n)",
    ),
    Mutant(
        "labels stay on their way", "csrc/common/union_find.h",
        "label[s] = label[label[s]];", "label[s] = label[s];",
    ),
    Mutant(
        "the lower root hangs under the higher one", "triton_kernels/_union_find.py",
        "high, low = tl.maximum(top_a, top_b), tl.minimum(top_a, top_b)",
        "low, high = tl.maximum(top_a, top_b), tl.minimum(top_a, top_b)",
    ),
]  # fmt: skip
