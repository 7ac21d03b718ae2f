"""bipartite_match in Triton: a program takes a tile of a segment's sources past all of its destinations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms
from vtok.triton_kernels._canonical import cosine

SOURCES, DESTINATIONS, STEP = 64, 32, 16  # rows and columns of the tiles that meet


@triton.jit
def match_bound(cu_seqlens, v, rows):
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + v), 0), rows)


@triton.jit
def match_order(x):
    """int32 keys that grow with a similarity; -0 and +0 share one, NaN has the least."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return tl.where(x != x, -2147483648, keys)


@triton.jit
def match_kernel(
    rows, cu_seqlens, best, target, count, D, stride, segments, depth, split, protected, eps, span,
    SOURCES: tl.constexpr, DESTINATIONS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    v, high = tile * 0, tile * 0 + segments  # the last segment whose first tile is this one or an earlier one
    for _ in range(depth):
        middle = (v + high) // 2
        open_ = high - v > 1
        earlier = match_bound(cu_seqlens, middle, count) // span + middle <= tile
        v, high = tl.where(open_ & earlier, middle, v), tl.where(open_ & (earlier == 0), middle, high)
    begin = match_bound(cu_seqlens, v, count)
    size = tl.maximum(match_bound(cu_seqlens, v + 1, count) - begin, 0)
    guarded = tl.minimum(size, protected)
    number = guarded - guarded // split + (tile - begin // span - v) * SOURCES + tl.arange(0, SOURCES)
    looks = number < size - size // split
    source = begin + number + number // (split - 1)
    a_row = rows + tl.where(looks, source, 0) * stride
    column = tl.arange(0, STEP)
    found = tl.full((SOURCES,), -2147483648, tl.int32)
    at = tl.full((SOURCES,), -1, tl.int64)
    for first in range(guarded // split, size // split, DESTINATIONS):
        other = first + tl.arange(0, DESTINATIONS)
        receives = other < size // split
        destination = begin + other * split + split - 1
        b_row = rows + tl.where(receives, destination, 0) * stride
        dots = tl.zeros((SOURCES, DESTINATIONS), tl.float32)
        norm_a, norm_b = tl.zeros((SOURCES,), tl.float32), tl.zeros((DESTINATIONS,), tl.float32)
        for start in range(0, D, STEP):
            inside = (column < D - start)[None, :]
            a = tl.load(a_row[:, None] + (start + column)[None, :], mask=looks[:, None] & inside, other=0)
            b = tl.load(b_row[:, None] + (start + column)[None, :], mask=receives[:, None] & inside, other=0)
            a, b = a.to(tl.float32), b.to(tl.float32)
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
            norm_a += tl.sum(a * a, 1)
            norm_b += tl.sum(b * b, 1)
        alike = cosine(dots, norm_a[:, None], norm_b[None, :], tl.cast(eps, tl.float32))
        keys = tl.where(receives[None, :], match_order(alike), -2147483648)
        top = tl.max(keys, 1)
        hit = receives[None, :] & (keys == top[:, None])
        row = tl.min(tl.where(hit, destination[None, :], count), 1)  # the lowest of equals
        better = (at < 0) | (top > found)
        found, at = tl.where(better, top, found), tl.where(better, row, at)
    bits = tl.where(found < 0, -found | -2147483648, found)
    value = tl.where(found == -2147483648, float("nan"), bits.to(tl.float32, bitcast=True))
    tl.store(best + source, tl.where(at < 0, float("-inf"), value), mask=looks)
    tl.store(target + source, at, mask=looks)


def bipartite_match(
    rows: torch.Tensor, cu_seqlens: torch.Tensor, *, split: int = 2, protected: int = 0, eps: float = 1e-8
) -> tuple[torch.Tensor, torch.Tensor]:
    _rooms.ROOMS["bipartite_match"].check(rows, cu_seqlens, split, protected, eps)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    (count, D), segments = rows.shape, cu_seqlens.shape[0] - 1
    best = rows.new_full((count,), float("-inf"), dtype=torch.float32)
    target = torch.arange(count, dtype=torch.int64, device=rows.device)
    if count and segments:
        span = SOURCES + SOURCES // (split - 1)  # rows of a segment that hold at most SOURCES sources
        match_kernel[(count // span + segments,)](
            rows, cu_seqlens.contiguous(), best, target, count, D, rows.stride(0), segments, segments.bit_length(),
            split, protected, eps, span, SOURCES=SOURCES, DESTINATIONS=DESTINATIONS, STEP=STEP,
            num_warps=8 if rows.dtype == torch.float64 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return best, target
