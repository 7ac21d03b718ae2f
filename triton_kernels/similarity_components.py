"""similarity_components in Triton: a program takes a tile of a group's rows past the rows after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms
from vtok.triton_kernels._canonical import cosine
from vtok.triton_kernels._union_find import any_of, join_roots, root_of

ROWS, OTHERS, STEP = 32, 32, 16  # rows and columns of the tiles that meet; larger ones spill on some targets
BLOCK = 128


@triton.jit
def bound(cu_seqlens, g, rows):
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + g), 0), rows)


@triton.jit
def roots_now(label, s, active):
    """A root of each node as of now; others go on joining."""
    above = tl.load(label + s, mask=active, other=0, volatile=True)
    climbs = active & (above != s)
    while any_of(climbs):
        s = tl.where(climbs, above, s)
        above = tl.load(label + s, mask=climbs, other=0, volatile=True)
        climbs = climbs & (above != s)
    return s


@triton.jit
def join_pairs(label, row, other, linked, count):
    """Joins row i [ROWS] with other j [OTHERS] where linked [ROWS, OTHERS]: each with the lowest root that it is linked
    with, until all that are linked have one root."""
    in_row, in_other = tl.max(linked.to(tl.int32), 1) != 0, tl.max(linked.to(tl.int32), 0) != 0
    apart = any_of(in_row)
    while apart:
        a, b = roots_now(label, row, in_row), roots_now(label, other, in_other)
        low_b = tl.min(tl.where(linked, b[None, :], count), 1)
        low_a = tl.min(tl.where(linked, a[:, None], count), 0)
        unlike_a, unlike_b = in_row & (low_b != a), in_other & (low_a != b)
        join_roots(label, a, tl.where(unlike_a, low_b, 0), unlike_a)
        join_roots(label, b, tl.where(unlike_b, low_a, 0), unlike_b)
        apart = any_of(unlike_a) | any_of(unlike_b)


@triton.jit
def link_kernel(
    rows, cu_seqlens, label, count, D, stride, groups, depth, threshold, eps,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    g, high = tile * 0, tile * 0 + groups  # the last group whose first tile is this one or an earlier one
    for _ in range(depth):
        middle = (g + high) // 2
        open_ = high - g > 1
        earlier = bound(cu_seqlens, middle, count) // ROWS + middle <= tile
        g, high = tl.where(open_ & earlier, middle, g), tl.where(open_ & (earlier == 0), middle, high)
    begin, end = bound(cu_seqlens, g, count), bound(cu_seqlens, g + 1, count)
    start = begin + (tile - begin // ROWS - g) * ROWS
    row = start + tl.arange(0, ROWS)
    a_row = rows + tl.where(row < end, row, 0) * stride
    column = tl.arange(0, STEP)
    for first in range(start, end, OTHERS):
        other = first + tl.arange(0, OTHERS)
        b_row = rows + tl.where(other < end, other, 0) * stride
        dots = tl.zeros((ROWS, OTHERS), tl.float32)
        norm_a, norm_b = tl.zeros((ROWS,), tl.float32), tl.zeros((OTHERS,), tl.float32)
        for at in range(0, D, STEP):
            inside = (column < D - at)[None, :]
            a = tl.load(a_row[:, None] + (at + column)[None, :], mask=(row < end)[:, None] & inside, other=0)
            b = tl.load(b_row[:, None] + (at + column)[None, :], mask=(other < end)[:, None] & inside, other=0)
            a, b = a.to(tl.float32), b.to(tl.float32)
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
            norm_a += tl.sum(a * a, 1)
            norm_b += tl.sum(b * b, 1)
        alike = cosine(dots, norm_a[:, None], norm_b[None, :], tl.cast(eps, tl.float32))
        linked = (alike > tl.cast(threshold, tl.float32)) & (row < end)[:, None] & (other < end)[None, :]
        join_pairs(label, row, other, linked, count)


@triton.jit
def flatten_kernel(label, cu_seqlens, groups, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < bound(cu_seqlens, groups, count)
    root_of(label, row, inside)
    tl.store(label + row, tl.full((BLOCK,), -1, tl.int64), mask=(row < count) & (inside == 0))


def similarity_components(
    rows: torch.Tensor, cu_seqlens: torch.Tensor, threshold: float, *, eps: float = 1e-8
) -> torch.Tensor:
    _rooms.ROOMS["similarity_components"].check(rows, cu_seqlens, threshold, eps)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    cu_seqlens, (count, D), groups = cu_seqlens.contiguous(), rows.shape, cu_seqlens.shape[0] - 1
    label = torch.arange(count, dtype=torch.int64, device=rows.device)
    if count and groups:
        link_kernel[(count // ROWS + groups,)](
            rows, cu_seqlens, label, count, D, rows.stride(0), groups, groups.bit_length(), threshold, eps,
            ROWS=ROWS, OTHERS=OTHERS, STEP=STEP, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
    if count:
        flatten_kernel[(triton.cdiv(count, BLOCK),)](label, cu_seqlens, groups, count, BLOCK=BLOCK)
    return label
