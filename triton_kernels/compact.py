"""compact in Triton: runs of rows are counted, then listed from the sum of the runs before them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms

RUN = 64  # rows counted together
BLOCK = 32  # runs, or boundaries, of a program


@triton.jit
def load_kept(keep, run, end, RUN: tl.constexpr):
    """[BLOCK, RUN]: 1 for each kept row of these runs before `end`, else 0."""
    s = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    return (tl.load(keep + s, mask=s < end, other=0) != 0).to(tl.int32)


@triton.jit
def last_boundary(cu, videos, rows):
    """The end of the rows that count; boundaries are not trusted."""
    return tl.minimum(tl.maximum(tl.load(cu + videos), 0), rows)


@triton.jit
def count_kernel(keep, cu, counts, rows, videos, runs, BLOCK: tl.constexpr, RUN: tl.constexpr):
    run = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = load_kept(keep, run, last_boundary(cu, videos, rows), RUN)
    tl.store(counts + run, tl.sum(kept, 1).to(tl.int64), mask=run < runs)


@triton.jit
def list_kernel(keep, cu, slots, index, rows, videos, runs, capacity, BLOCK: tl.constexpr, RUN: tl.constexpr):
    run = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = load_kept(keep, run, last_boundary(cu, videos, rows), RUN)
    slot = tl.load(slots + run, mask=run < runs, other=0)[:, None] + tl.cumsum(kept, 1) - kept
    row = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(index + slot, row, mask=(kept != 0) & (slot < capacity))


@triton.jit
def boundary_kernel(keep, cu, slots, before, rows, videos, BLOCK: tl.constexpr, RUN: tl.constexpr):
    """before[v]: kept rows before boundary v."""
    v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    boundary = tl.load(cu + v, mask=v <= videos, other=0)
    boundary = tl.minimum(tl.maximum(boundary, 0), last_boundary(cu, videos, rows))
    run = boundary // RUN
    kept = load_kept(keep, run, boundary[:, None], RUN)
    tl.store(before + v, tl.load(slots + run) + tl.sum(kept, 1), mask=v <= videos)


def compact(keep: torch.Tensor, cu_seqlens: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    _rooms.ROOMS["compact"].check(keep, cu_seqlens, capacity)
    rows, videos = keep.shape[0], cu_seqlens.shape[0] - 1
    keep, cu_seqlens = keep.contiguous().view(torch.uint8), cu_seqlens.contiguous()
    index, before = cu_seqlens.new_full((capacity,), -1), torch.empty_like(cu_seqlens)
    runs = triton.cdiv(rows, RUN)
    slots = cu_seqlens.new_zeros(runs + 1)  # kept rows before each run
    sizes = {"BLOCK": BLOCK, "RUN": RUN}
    if rows:
        grid, counts = (triton.cdiv(runs, BLOCK),), cu_seqlens.new_empty(runs)
        count_kernel[grid](keep, cu_seqlens, counts, rows, videos, runs, **sizes)
        torch.cumsum(counts, 0, out=slots[1:])
        list_kernel[grid](keep, cu_seqlens, slots, index, rows, videos, runs, capacity, **sizes)
    grid = (triton.cdiv(videos + 1, BLOCK),)
    boundary_kernel[grid](keep, cu_seqlens, slots, before, rows, videos, **sizes)
    return index, before.diff()
