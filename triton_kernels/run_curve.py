"""run_curve in Triton: one kernel multiplies the rows of each site, a program to a tile; in another a program takes
a site. Costs, a row for each row of the tokens, lie in a workspace, as do the masks and the least sums of
the number of runs before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms
from vtok.ops.run_curve import WORD

TILE, STEP = 32, 16  # rows and columns of the tiles that meet
PROGRAMS = 512  # to aim at: the host knows no layout


@triton.jit
def difference(tokens, row, first, stride, start, D, STEP: tl.constexpr):
    """Columns [start, start + STEP) of rows minus the first one, as float32; zeros beyond the last."""
    column = start + tl.arange(0, STEP)
    inside = column < D
    x = tl.load(tokens + (row * stride)[:, None] + column[None, :], mask=inside[None, :], other=0)
    y = tl.load(tokens + first * stride + column, mask=inside, other=0)[None, :]
    if x.dtype == tl.float64:
        return (x - y).to(tl.float32)
    else:
        return x.to(tl.float32) - y.to(tl.float32)


@triton.jit
def sites_of(begins, lengths, tokens_per_frame, v, frames):
    """A video's first row, its rows to a frame, its frames, and its sites: none where they have too many frames."""
    begin, n, T = tl.load(begins + v), tl.load(tokens_per_frame + v), tl.load(lengths + v).to(tl.int32)
    return begin, n, T, tl.where((T > 0) & (T <= frames), n, 0)


@triton.jit
def multiply_kernel(
    tokens, begins, lengths, tokens_per_frame, costs, D, stride, videos, frames, TILE: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(frames, TILE)
    a, b = tl.program_id(2) // tiles * TILE, tl.program_id(2) % tiles * TILE
    i, j = a + tl.arange(0, TILE), b + tl.arange(0, TILE)
    for v in range(tl.program_id(0), videos, tl.num_programs(0)):
        begin, n, T, sites = sites_of(begins, lengths, tokens_per_frame, v, frames)
        for site in range(tl.program_id(1), tl.where((a <= b) & (b < T), sites, 0), tl.num_programs(1)):
            first, cost = begin + site, costs + (begin + site * T) * frames
            dots = tl.zeros((TILE, TILE), tl.float32)
            for start in range(0, D, STEP):  # rows beyond the last frame repeat it
                x = difference(tokens, first + tl.minimum(i, T - 1) * n, first, stride, start, D, STEP)
                y = difference(tokens, first + tl.minimum(j, T - 1) * n, first, stride, start, D, STEP)
                dots = tl.dot(x, tl.trans(y), dots, input_precision="ieee")
            mask = (i < T)[:, None] & (j < T)[None, :]
            tl.store(cost + i[:, None] * frames + j[None, :], dots, mask=mask)


@triton.jit
def fill_costs(cost, weights, first, step, T, pitch, BLOCK: tl.constexpr):
    """Products become what frames i to j cost as one run, row by row from the last. Whether all is finite, of each."""
    j = tl.arange(0, BLOCK)
    weight = tl.full((BLOCK,), 1, tl.float64)
    if weights is not None:
        weight = tl.load(weights + first + j * step, mask=j < T, other=0).to(tl.float64)
    weight = tl.where(j < T, weight, 0)
    square = tl.load(cost + j * (pitch + 1), mask=j < T, other=0).to(tl.float64) * weight
    most = (tl.zeros((BLOCK,), tl.float64) + 4 * tl.sum(weight) * tl.sum(square)).to(tl.float32)
    finite = most - most == 0
    squares, weight_sum = tl.cumsum(square), tl.cumsum(weight)
    rest = tl.zeros((BLOCK,), tl.float64)  # |Σ w·y|² of the run
    for back in range(T):
        i = T - 1 - back
        own = tl.sum(tl.where(j == i, weight, 0))
        inside = (j >= i) & (j < T)
        row = tl.load(cost + i * pitch + j, mask=inside, other=0).to(tl.float64) * own * weight
        sums = tl.cumsum(row)
        rest += tl.where(inside, 2 * sums - tl.sum(tl.where(j == i, row, 0)), 0)
        squares_before = tl.sum(tl.where(j == i - 1, squares, 0))
        whole = weight_sum - tl.sum(tl.where(j == i - 1, weight_sum, 0))
        left = (squares - squares_before) - rest / tl.where(whole > 0, whole, 1)
        real = finite & (j > i) & (whole > 0) & (left > 0)
        tl.store(cost + i * pitch + j, tl.where(real, left, 0).to(tl.float32), mask=inside)
    return finite


@triton.jit
def hull(curve, gain, T, finite, BLOCK: tl.constexpr):
    """From corner to corner, each time to the one that the steepest line leads to, the last of equals."""
    k = tl.arange(0, BLOCK)
    point = tl.load(curve + k, mask=k < T, other=0).to(tl.float64)
    found = tl.where(k == 0, float("inf"), 0.0).to(tl.float32)
    corner = T * 0
    while corner < T - 1:
        here = tl.sum(tl.where(k == corner, point, 0))
        ahead = (k > corner) & (k < T)
        slope = tl.where(ahead, (here - point) / tl.where(ahead, k - corner, 1).to(tl.float64), -1)
        steepest = tl.max(slope)
        after = tl.max(tl.where(slope == steepest, k, -1))
        found = tl.where((k > corner) & (k <= after), steepest.to(tl.float32), found)
        corner = after
    tl.store(gain + k, tl.where(finite | (k == 0), found, float("nan")), mask=k < T)
    tl.debug_barrier()
    tl.store(curve + k, tl.where(finite, point.to(tl.float32), float("nan")), mask=k < T)


@triton.jit
def run_curve_kernel(
    begins, lengths, tokens_per_frame, weights, curve, gain, opens, costs, sums, bits,
    rows, videos, frames, words, BLOCK: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, BLOCK)
    for v in range(tl.program_id(0), videos, tl.num_programs(0)):
        begin, n, T, sites = sites_of(begins, lengths, tokens_per_frame, v, frames)
        for site in range(tl.program_id(1), sites, tl.num_programs(1)):
            first, entry = begin + site, begin + site * T
            cost, least, masks = costs + entry * frames, sums + entry, bits + entry * words
            finite = fill_costs(cost, weights, first, n, T, frames, BLOCK)
            tl.debug_barrier()
            best = tl.load(cost + j, mask=j < T, other=0)
            low = tl.sum(tl.where(j == T - 1, best, 0))
            tl.store(curve + entry, low)
            tl.store(least + j, best, mask=j < T)
            for w in range(words):
                word = tl.where(w == 0, j * 0 + 1, 0).to(tl.int64)
                tl.store(masks + j * words + w, word, mask=j < T)
                tl.store(opens + entry * words + w + j * 0, word, mask=j == T - 1)
            tl.debug_barrier()
            for k in range(1, T):
                old, new = (k + 1) % 2 * rows, k % 2 * rows  # of an odd and an even number of runs
                best = tl.full((BLOCK,), float("inf"), tl.float32)
                at = tl.full((BLOCK,), 0, tl.int32) + k
                for i in range(k, T):  # where the last run opens
                    before = tl.load(least + old + i - 1)
                    total = before + tl.load(cost + i * frames + j, mask=(j >= i) & (j < T), other=float("inf"))
                    at = tl.where(total < best, i, at)
                    best = tl.minimum(total, best)
                for w in range(words):
                    word = tl.load(masks + (old + at - 1) * words + w, mask=(j >= k) & (j < T), other=0)
                    bit = tl.full((BLOCK,), 1, tl.int64) << (at % WORD).to(tl.int64)
                    word |= tl.where(at // WORD == w, bit, 0)
                    tl.store(masks + (new + j) * words + w, word, mask=(j >= k) & (j < T))
                    tl.store(opens + (entry + k) * words + w + j * 0, word, mask=j == T - 1)
                tl.store(least + new + j, best, mask=j < T)
                low = tl.minimum(low, tl.min(tl.where(j == T - 1, best, float("inf"))))
                tl.store(curve + entry + k, low)
                tl.debug_barrier()
            hull(curve + entry, gain + entry, T, finite, BLOCK)


def run_curve(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tokens_per_frame: torch.Tensor,
    frames: int,
    *,
    weights: torch.Tensor | None = None,
    extra_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _rooms.ROOMS["run_curve"].check(tokens, cu_seqlens, tokens_per_frame, frames, weights, extra_rows)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    (rows, D), videos, words = tokens.shape, tokens_per_frame.shape[0], (frames + WORD - 1) // WORD
    curve = tokens.new_zeros(rows, dtype=torch.float32)  # as if every row were a site of its own
    gain, opens = torch.full_like(curve, float("inf")), cu_seqlens.new_zeros(rows, words)
    opens[:, 0] = 1
    if rows and videos:
        longest = min(frames, rows)
        block = max(16 if longest <= 64 else 256, triton.next_power_of_2(longest))  # at 128 sm_100 needs a stack frame
        grid = min(videos, PROGRAMS), min(max(PROGRAMS // videos, 1), triton.cdiv(rows, videos))
        bounds, n = cu_seqlens.clamp(0, rows), tokens_per_frame.contiguous()
        lengths = torch.where(n > 0, (bounds.diff() - extra_rows).clamp(min=0) // n.clamp(min=1), 0)
        costs = curve.new_empty(rows, longest)
        multiply_kernel[(*grid, triton.cdiv(longest, TILE) ** 2)](
            tokens, bounds, lengths, n, costs, D, tokens.stride(0), videos, longest, TILE=TILE, STEP=STEP, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        run_curve_kernel[grid](
            bounds, lengths, n, None if weights is None else weights.contiguous(), curve, gain, opens, costs,
            curve.new_empty(2, rows), opens.new_empty(2, rows, words), rows, videos, longest, words,
            BLOCK=block, WORD=WORD, num_warps=2 if block <= 64 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return curve, gain, opens.flatten()
