from mutant import Mutant

MUTANTS = [
    Mutant("rounds forget how many rows joined before", "vtok/methods/tome.py",
           "ops.merge(x, *ops.group(joined, total), weight)", "ops.merge(x, *ops.group(joined, total))"),
    Mutant("a NaN joins first", "vtok/methods/tome.py",
           "best.nan_to_num(-LARGEST, LARGEST, -LARGEST)", "best.nan_to_num(LARGEST, LARGEST, -LARGEST)"),
    Mutant("a clip's share is rounded by itself", "vtok/methods/tome.py",
           "kept * end // frames.clamp(min=1) - kept * t // frames.clamp(min=1)",
           "kept * (end - t) // frames.clamp(min=1)"),
]  # fmt: skip
