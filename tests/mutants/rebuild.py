from mutant import Mutant

MUTANTS = [
    Mutant("the residual is of the block in place", "vtok/gate.py", "before, moves, **", "before, None, **"),
    Mutant("vectors are left behind", "vtok/packed.py", "else self.vectors[source]", "else self.vectors"),
    Mutant(
        "blocks are taken from the wrong side", "vtok/rebuild.py",
        "+ each_pixel(vectors[:, 1]", "- each_pixel(vectors[:, 1]",
    ),
]  # fmt: skip
