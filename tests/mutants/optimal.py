from mutant import Mutant

MUTANTS = [
    Mutant(
        "the price of a run is the last gain taken of the batch's first video", "vtok/methods/optimal.py",
        "price[video] * (slot", "price[0] * (slot",
    ),
    Mutant(
        "the search stops short of candidates at the gap", "vtok/methods/optimal.py",
        "cost <= gap[v] * (1 + 2**-40)", "cost <= gap[v] / 4",
    ),
    Mutant(
        "weights are forgotten", "vtok/methods/optimal.py",
        "weights=goal.sizes, extra", "weights=None, extra",
    ),
    Mutant(
        "the batch's budget is divided in proportion", "vtok/methods/optimal.py",
        "    if plan.shared:\n        segments, cu_k", "    if False:\n        segments, cu_k",
    ),
    Mutant(
        "masks beyond the first word are misplaced", "vtok/methods/optimal.py",
        "* words + frame // WORD]", "* words + frame // (2 * WORD)]",
    ),
]  # fmt: skip
