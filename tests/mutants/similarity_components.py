from mutant import Mutant

MUTANTS = [
    Mutant(
        "the threshold itself is enough", "csrc/similarity_components/similarity_components.cuh",
        "cosine > args.threshold ?", "cosine >= args.threshold ?",
    ),
    Mutant(
        "a tile meets itself alone", "csrc/similarity_components/similarity_components.cuh",
        "other * kDotTile < rows; other", "other * kDotTile < rows && other <= own; other",
    ),
    Mutant(
        "roots are read before they are found", "csrc/similarity_components/similarity_components.cuh",
        "find_root(args.label, row);\n    }\n    __syncthreads();", "find_root(args.label, row);\n    }",
    ),
    Mutant(
        "a row beyond the groups keeps its label", "csrc/similarity_components/similarity_components.cuh",
        "else args.label[row] = -1;", "else args.label[row] = row;",
    ),
    Mutant(
        "NaN is linked", "csrc/similarity_components/similarity_components_cpu.inc",
        "(vword)(alike > call.threshold)", "~(vword)(alike <= call.threshold)",
    ),
    Mutant(
        "rows of the next tile are left out", "csrc/similarity_components/similarity_components_cpu.inc",
        "first < tile.end; first", "first < tile.row + tile.count; first",
    ),
    Mutant(
        "one round of joins is taken for all", "triton_kernels/similarity_components.py",
        "        apart = any_of(unlike_a) | any_of(unlike_b)", "        apart = False",
    ),
]  # fmt: skip
