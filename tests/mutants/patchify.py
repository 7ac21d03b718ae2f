from mutant import Mutant

MUTANTS = [
    Mutant("a carry is lost", "csrc/patchify/patchify.cuh", "place.step -= carry ? args.wrap[d] : 0;", ""),
    Mutant(
        "one row too many is written", "csrc/patchify/patchify.cuh",
        "if (k >= args.count)", "if (k > args.count)", sanitize=True,
    ),
    Mutant("pixels outside are read", "csrc/patchify/patchify.cuh",
           "inside = patch_has(args.grid, row.place, y, x);", "inside = true;"),
    Mutant(
        "the mean does not cancel", "csrc/patchify/patchify_cpu.inc",
        "(value - load_lanes<L>(reference + i)) * scale;", "(value - load_lanes<L>(reference + i)) * scale - shift;",
    ),
    Mutant("the overlap is left out", "csrc/patchify/patchify_cpu.inc", "if (i < n) at(n - L);", ""),
    Mutant(
        "the tubelet is one frame", "csrc/patchify/patchify.h",
        "last_digit(site, g.steps) * g.tubelet;", "last_digit(site, g.steps);",
    ),
    Mutant("a row of padding has a reference", "triton_kernels/patchify.py", "used = valid & (other", "used = (other"),
    Mutant("duplicates are averaged", "vtok/ops/patchify.py",
           'rows.contiguous(), members, offsets, reduce="sum")', 'rows.contiguous(), members, offsets, reduce="mean")'),
    Mutant("a block beside the frame is read", "csrc/patchify/patchify.h", " && x >= place.wide - g.width", ""),
    Mutant("words of a moved block are aligned", "csrc/patchify/patchify.cuh", "% kPatchifyAlign<In, N> == 0", "!= 1",
           sanitize=True),
]  # fmt: skip
