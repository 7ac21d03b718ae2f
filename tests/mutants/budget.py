from mutant import Mutant

MUTANTS = [
    Mutant("a share is rounded up", "vtok/budget.py",
           "available * part.numerator // part.denominator", "-(-available * part.numerator // part.denominator)"),
]  # fmt: skip
