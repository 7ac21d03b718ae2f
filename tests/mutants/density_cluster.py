from mutant import Mutant

MUTANTS = [
    Mutant(
        "the tiles in shared memory are overwritten while they are read", "csrc/density_cluster/cluster_tile.cuh",
        "    subtract_tiles(shared.dots, x, y, sums);\n    __syncthreads();\n",
        "    subtract_tiles(shared.dots, x, y, sums);\n",
    ),
    Mutant(
        "others are replaced while rows still meet them", "csrc/density_cluster/cluster_tile.cuh",
        "infinite());\n    }\n  __syncthreads();\n}", "infinite());\n    }\n}",
    ),
    Mutant(
        "a group has no room for its last tile", "csrc/density_cluster/density_cluster.cuh",
        "return count / kClusterTile + groups;", "return count / kClusterTile + groups / 2 + 1;",
    ),
    Mutant(
        "rows whose nearest one is not denser keep it", "csrc/density_cluster/density_cluster.cuh",
        "open = near.row >= args.of.count ||", "open = near.row >= args.of.count &&",
    ),
    Mutant(
        "the higher of two equal rows ranks first", "csrc/density_cluster/density_cluster.cuh",
        "(shared.keys[j] == key && first + j < row)", "(shared.keys[j] == key && first + j > row)",
    ),
    Mutant(
        "a NaN score ranks first", "csrc/density_cluster/density_cluster.cuh",
        "score != score ? 1 :", "score != score ? 0xffffffffffull :",
    ),
    Mutant(
        "the least squares are not in order", "csrc/density_cluster/density_cluster.cuh",
        "at > 0 && list[(at - 1) * kClusterTile] > x;", "at > 1 && list[(at - 1) * kClusterTile] > x;",
    ),
    Mutant(
        "a centre joins its twin", "csrc/density_cluster/density_cluster_cpu.inc",
        "tile.others[first + j] == tile.rows[i] ? -1.0f : squares[j]", "squares[j]",
    ),
    Mutant(
        "the columns after the last whole vector are left as they were",
        "csrc/density_cluster/density_cluster_cpu.inc", "at % kLanes; ++at) to[at] = 0;", "at % 2; ++at) to[at] = 0;",
    ),
    Mutant(
        "the denser of equals is the later one", "csrc/density_cluster/density_cluster.h",
        "(mean_a == mean_b && a < b)", "(mean_a == mean_b && a > b)",
    ),
    Mutant(
        "a centre joins its twin in another slot", "triton_kernels/density_cluster.py",
        "centre[None, :] == row[:, None], -1.0, q)", "centre[None, :] == row[:, None], 0.0, q)",
    ),
]  # fmt: skip
