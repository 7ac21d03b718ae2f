"""group in Triton: a stable radix sort of rows by group, the lowest digit first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms

TILE = 256
DIGIT = 8  # bits of a digit at most


@triton.jit
def load_row(rows, at, S, FIRST: tl.constexpr):
    """The row in place `at`: in the first pass they are in order. -1 past the end, and where it has no group."""
    return tl.where(at < S, at, -1) if FIRST else tl.load(rows + at, mask=at < S, other=-1)


@triton.jit
def load_group(assignment, row, k):
    """The group of a row; k, one past the last, where it has none."""
    g = tl.load(assignment + row, mask=row >= 0, other=-1)
    return tl.where((g >= 0) & (g < k), g, k)


@triton.jit
def load_digit(assignment, rows, at, S, k, shift, FIRST: tl.constexpr, BINS: tl.constexpr):
    """A digit of the group in place `at`; the largest past the end."""
    digit = (load_group(assignment, load_row(rows, at, S, FIRST), k) >> shift).to(tl.int32) & (BINS - 1)
    return tl.where(at < S, digit, BINS - 1)


@triton.jit
def count_kernel(assignment, rows, counts, S, k, shift, FIRST: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr):
    """counts [BINS, tiles]: rows of each digit in each tile."""
    tile = tl.program_id(0).to(tl.int64)
    digit = load_digit(assignment, rows, tile * TILE + tl.arange(0, TILE), S, k, shift, FIRST, BINS)
    counted = tl.histogram(digit, BINS).to(tl.int64)
    tl.store(counts + tl.arange(0, BINS) * tl.num_programs(0).to(tl.int64) + tile, counted)


@triton.jit
def scatter_kernel(assignment, rows, slots, out, S, k, shift, FIRST: tl.constexpr, LAST: tl.constexpr,
                   TILE: tl.constexpr, BINS: tl.constexpr):  # fmt: skip
    """Moves each row to the first slot that its tile has for its digit, plus its rank among those of the tile."""
    tile = tl.program_id(0).to(tl.int64)
    place, some = tl.arange(0, TILE), tl.arange(0, 32)
    at = tile * TILE + place
    digit = load_digit(assignment, rows, at, S, k, shift, FIRST, BINS)
    rank = tl.zeros([TILE], tl.int32)
    for start in range(0, TILE, 32):
        other = load_digit(assignment, rows, tile * TILE + start + some, S, k, shift, FIRST, BINS)
        ahead = (other[None, :] == digit[:, None]) & ((start + some)[None, :] < place[:, None])  # [TILE, 32]
        rank += tl.sum(ahead.to(tl.int32), 1)
    slot = tl.load(slots + digit * tl.num_programs(0).to(tl.int64) + tile) + rank
    row = load_row(rows, at, S, FIRST)
    if LAST:
        row = tl.where(load_group(assignment, row, k) < k, row, -1)
    tl.store(out + slot, row, mask=at < S)


@triton.jit
def offsets_kernel(assignment, members, offsets, S, k, STEPS, BLOCK: tl.constexpr):
    """The first slot of each group, by binary search."""
    g = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    low = tl.zeros([BLOCK], tl.int64)
    high = low + S
    for _ in range(STEPS):
        middle = (low + high) // 2
        row = tl.load(members + middle, mask=low < high, other=-1)
        right = (low < high) & (load_group(assignment, row, k) < g)
        low, high = tl.where(right, middle + 1, low), tl.where(right, high, middle)
    tl.store(offsets + g, low, mask=g <= k)


def group(assignment: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    _rooms.ROOMS["group"].check(assignment, k)
    assignment, S = assignment.contiguous(), assignment.shape[0]
    rows, offsets = torch.empty_like(assignment), assignment.new_empty(k + 1)
    width = max(k.bit_length(), 1)
    bits = triton.cdiv(width, triton.cdiv(width, DIGIT))
    tiles = triton.cdiv(S, TILE)
    for shift in range(0, width if S else 0, bits):
        counts, out = assignment.new_empty(1 << bits, tiles), torch.empty_like(rows)
        sizes = {"FIRST": shift == 0, "TILE": TILE, "BINS": 1 << bits}
        count_kernel[(tiles,)](assignment, rows, counts, S, k, shift, **sizes)
        slots = counts.view(-1).cumsum(0).view_as(counts) - counts
        scatter_kernel[(tiles,)](assignment, rows, slots, out, S, k, shift, LAST=shift + bits >= width, **sizes)
        rows = out
    grid = (triton.cdiv(k + 1, 1024),)
    offsets_kernel[grid](assignment, rows, offsets, S, k, S.bit_length(), BLOCK=1024)
    return rows, offsets
