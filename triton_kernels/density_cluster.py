"""density_cluster in Triton: programs take a tile of a group's rows past all of the group, for the density, for the
distance to the nearest denser row, for the rank and for the nearest centre."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms
from vtok.triton_kernels._canonical import div_rn
from vtok.triton_kernels._common import all_registers

ROWS, OTHERS = 64, 64  # of the tiles that meet
LIST = 1024  # rows that a program lists at a time


@triton.jit
def cluster_bound(cu, v, most):
    return tl.minimum(tl.maximum(tl.load(cu + v), 0), most)


@triton.jit
def cluster_group(cu_seqlens, count, groups, depth, ROWS: tl.constexpr):
    """(group, its first row, its end, number among its tiles) of this program's tile."""
    tile = tl.program_id(0).to(tl.int64)
    v, high = tile * 0, tile * 0 + groups  # the last group whose first tile is this one or an earlier one
    for _ in range(depth):
        middle = (v + high) // 2
        open_ = high - v > 1
        earlier = cluster_bound(cu_seqlens, middle, count) // ROWS + middle <= tile
        v, high = tl.where(open_ & earlier, middle, v), tl.where(open_ & (earlier == 0), middle, high)
    begin = cluster_bound(cu_seqlens, v, count)
    end = tl.maximum(cluster_bound(cu_seqlens, v + 1, count), begin)
    return v, begin, end, tl.maximum(tile - begin // ROWS - v, 0)


@triton.jit
def takes_part(valid, row, end, MASKED: tl.constexpr):
    inside = row < end
    if MASKED:
        inside = inside & (tl.load(valid + row, mask=inside, other=0) != 0)
    return inside


@triton.jit
def lies_before(first, row, OTHERS: tl.constexpr):
    """[ROWS, OTHERS], which of the rows from the first on come before each row; in int32, for registers."""
    before = tl.minimum(tl.maximum(row - first, 0), OTHERS).to(tl.int32)
    return tl.arange(0, OTHERS)[None, :] < before[:, None]


@triton.jit
def squares(rows, stride, D, a, b, has_a, has_b, ROWS: tl.constexpr, OTHERS: tl.constexpr):
    """[ROWS, OTHERS] squared distances, column after column; infinite where they are NaN or of no row."""
    sums = tl.zeros((ROWS, OTHERS), tl.float32)
    a_row, b_row = rows + tl.where(has_a, a, 0) * stride, rows + tl.where(has_b, b, 0) * stride
    for column in range(D):
        x = tl.load(a_row + column, mask=has_a, other=0).to(tl.float32)
        y = tl.load(b_row + column, mask=has_b, other=0).to(tl.float32)
        difference = x[:, None] - y[None, :]
        sums += difference * difference
    real = has_a[:, None] & has_b[None, :] & (sums == sums)
    return tl.where(real, sums, float("inf"))


@triton.jit
def density_kernel(
    rows, valid, cu_seqlens, mean, farthest, count, D, stride, groups, depth, neighbours, denominator,
    MASKED: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    _v, begin, end, tile = cluster_group(cu_seqlens, count, groups, depth, ROWS)
    row = begin + tile * ROWS + tl.arange(0, ROWS)
    mine = takes_part(valid, row, end, MASKED)
    place = tl.arange(0, NEIGHBOURS)[None, :]
    least = tl.full((ROWS, NEIGHBOURS), float("inf"), tl.float32)  # in any order
    most = tl.zeros((ROWS,), tl.float32)
    number = begin * 0
    for first in range(begin, tl.where(begin + tile * ROWS < end, end, begin), OTHERS):
        other = first + tl.arange(0, OTHERS)
        takes = takes_part(valid, other, end, MASKED)
        q = squares(rows, stride, D, row, other, mine, takes, ROWS, OTHERS)
        number += tl.sum(takes.to(tl.int64))
        most = tl.maximum(most, tl.max(tl.where(mine[:, None] & takes[None, :], q, 0.0), 1))
        for _i in range(tl.minimum(neighbours, OTHERS)):
            x, at = tl.min(q, 1, return_indices=True)
            q = tl.where(tl.arange(0, OTHERS)[None, :] == at[:, None], float("inf"), q)
            worst, last = tl.max(tl.where(place < neighbours, least, -1.0), 1, return_indices=True)
            better = (place == last[:, None]) & (x < worst)[:, None]
            least = tl.where(better, x[:, None], least)
    sums = tl.zeros((ROWS,), tl.float32)
    among = tl.minimum(number, neighbours)
    for _j in range(among):  # ascending
        x, at = tl.min(least, 1, return_indices=True)
        least = tl.where(place == at[:, None], float("inf"), least)
        sums += x
    values = (among.to(tl.int64) * denominator).to(tl.float32)
    tl.store(mean + row, div_rn(sums, tl.zeros((ROWS,), tl.float32) + values), mask=mine)
    tl.store(farthest + tl.program_id(0), tl.max(most, 0))


@triton.jit
def cluster_log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = div_rn(mantissa - 1.0, mantissa + 1.0)
    w = s * s
    series = (((w * (1 / 9) + 1 / 7) * w + 1 / 5) * w + 1 / 3) * w + 1.0
    return exponent.to(tl.float32) * 0.6931471805599453 + (s + s) * series


@triton.jit
def delta_kernel(
    rows, valid, cu_seqlens, mean, farthest, score, count, D, stride, groups, depth, denominator,
    MASKED: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    _v, begin, end, tile = cluster_group(cu_seqlens, count, groups, depth, ROWS)
    row = begin + tile * ROWS + tl.arange(0, ROWS)
    mine = takes_part(valid, row, end, MASKED)
    m = tl.load(mean + row, mask=mine, other=0)
    nearest = tl.full((ROWS,), float("inf"), tl.float32)
    some = tl.zeros((ROWS,), tl.int32)
    stop = tl.where(begin + tile * ROWS < end, end, begin)
    most = tl.full((), 0.0, tl.float32)  # the group's largest distance
    first_tile = tl.program_id(0) - tile
    for t in range(first_tile, tl.minimum(first_tile + tl.cdiv(stop - begin, ROWS), tl.num_programs(0))):
        most = tl.maximum(most, tl.load(farthest + t))
    for first in range(begin, stop, OTHERS):
        other = first + tl.arange(0, OTHERS)
        takes = takes_part(valid, other, end, MASKED)
        n = tl.load(mean + other, mask=takes, other=0)[None, :]
        denser = (n < m[:, None]) | (n == m[:, None]) & lies_before(first, row, OTHERS)
        denser = denser & takes[None, :]
        q = squares(rows, stride, D, row, other, mine, takes, ROWS, OTHERS)
        nearest = tl.minimum(nearest, tl.min(tl.where(denser, q, float("inf")), 1))
        some = tl.maximum(some, tl.max(denser.to(tl.int32), 1))
    x = div_rn(tl.where(some != 0, nearest, most), tl.zeros((ROWS,), tl.float32) + tl.cast(denominator, tl.float32))
    delta = tl.where(x == 0, float("-inf"), tl.where(x == float("inf"), x, cluster_log(x) * 0.5))
    tl.store(score + row, delta - m, mask=mine)


@triton.jit
def cluster_order(x):
    """int64 keys that grow with a score; -0 and +0 share one, NaN has the least."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(x != x, -2147483648, tl.where(bits < 0, -2147483648 - bits, bits))


@triton.jit
def rank_kernel(
    valid, cu_seqlens, cu_k, score, chosen, count, groups, depth,
    MASKED: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    v, begin, end, tile = cluster_group(cu_seqlens, count, groups, depth, ROWS)
    row = begin + tile * ROWS + tl.arange(0, ROWS)
    mine = takes_part(valid, row, end, MASKED)
    key = cluster_order(tl.load(score + row, mask=mine, other=0))[:, None]
    before = tl.zeros((ROWS,), tl.int64)  # rows that beat this one
    for first in range(begin, tl.where(begin + tile * ROWS < end, end, begin), OTHERS):
        other = first + tl.arange(0, OTHERS)
        takes = takes_part(valid, other, end, MASKED)
        its = cluster_order(tl.load(score + other, mask=takes, other=0))[None, :]
        beats = (its > key) | (its == key) & lies_before(first, row, OTHERS)
        before += tl.sum((beats & takes[None, :]).to(tl.int64), 1)
    wanted = tl.load(cu_k + v + 1) - tl.load(cu_k + v)
    tl.store(chosen + row, (mine & (before < wanted)).to(tl.int8), mask=row < end)


@triton.jit
def list_kernel(cu_seqlens, cu_k, chosen, centres, count, k, LIST: tl.constexpr):
    v = tl.program_id(0).to(tl.int64)
    slot, last = cluster_bound(cu_k, v, k), cluster_bound(cu_k, v + 1, k)
    for first in range(cluster_bound(cu_seqlens, v, count), cluster_bound(cu_seqlens, v + 1, count), LIST):
        row = first + tl.arange(0, LIST)
        centre = tl.load(chosen + row, mask=row < cluster_bound(cu_seqlens, v + 1, count), other=0) != 0
        at = slot + tl.cumsum(centre.to(tl.int32)) - 1
        tl.store(centres + at, row, mask=centre & (at < last))
        slot += tl.sum(centre.to(tl.int32))


@triton.jit
def assign_kernel(
    rows, valid, cu_seqlens, cu_k, centres, assignment, count, D, stride, groups, depth, k,
    MASKED: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    v, begin, end, tile = cluster_group(cu_seqlens, count, groups, depth, ROWS)
    row = begin + tile * ROWS + tl.arange(0, ROWS)
    mine = takes_part(valid, row, end, MASKED)
    from_, last = cluster_bound(cu_k, v, k), cluster_bound(cu_k, v + 1, k)
    nearest = tl.full((ROWS,), float("inf"), tl.float32)
    slot = tl.full((ROWS,), -1, tl.int64)
    for first in range(from_, tl.where(begin + tile * ROWS < end, last, from_), OTHERS):
        at = first + tl.arange(0, OTHERS)
        centre = tl.load(centres + at, mask=at < last, other=-1)
        q = squares(rows, stride, D, row, centre, mine, centre >= 0, ROWS, OTHERS)
        q = tl.where(centre[None, :] == row[:, None], -1.0, q)
        x = tl.min(q, 1)
        hit = (centre >= 0)[None, :] & (q == x[:, None])
        low = tl.min(tl.where(hit, at[None, :], k), 1)  # the lowest of equals
        better = (low < k) & ((slot < 0) | (x < nearest))
        nearest, slot = tl.where(better, x, nearest), tl.where(better, low, slot)
    tl.store(assignment + row, slot, mask=mine)


def density_cluster(
    rows: torch.Tensor, cu_seqlens: torch.Tensor, cu_k: torch.Tensor, k: int, *, neighbours: int = 7,
    valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    _rooms.ROOMS["density_cluster"].check(rows, cu_seqlens, cu_k, k, neighbours, valid)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    cu_seqlens, cu_k = cu_seqlens.contiguous(), cu_k.contiguous()
    (count, D), groups = rows.shape, cu_seqlens.shape[0] - 1
    assignment, centres = cu_seqlens.new_full((count,), -1), cu_k.new_full((k,), -1)
    score = rows.new_full((count,), float("-inf"), dtype=torch.float32)
    if not count or not groups:
        return assignment, centres, score
    mask = rows if valid is None else valid.contiguous().view(torch.int8)
    tiles = count // ROWS + groups
    mean, farthest = rows.new_empty(count, dtype=torch.float32), rows.new_empty(tiles, dtype=torch.float32)
    chosen = rows.new_empty(count, dtype=torch.int8)
    about, group = (count, D, rows.stride(0)), (groups, groups.bit_length())
    options = {"MASKED": valid is not None, "ROWS": ROWS, "OTHERS": OTHERS, "num_warps": 8, "enable_fp_fusion": False}
    options |= all_registers()
    density_kernel[(tiles,)](
        rows, mask, cu_seqlens, mean, farthest, *about, *group, neighbours, max(D, 1), **options,
        NEIGHBOURS=triton.next_power_of_2(neighbours),
    )  # fmt: skip
    delta_kernel[(tiles,)](rows, mask, cu_seqlens, mean, farthest, score, *about, *group, max(D, 1), **options)
    rank_kernel[(tiles,)](mask, cu_seqlens, cu_k, score, chosen, count, *group, **options)
    list_kernel[(groups,)](cu_seqlens, cu_k, chosen, centres, count, k, LIST=LIST)
    assign_kernel[(tiles,)](rows, mask, cu_seqlens, cu_k, centres, assignment, *about, *group, k, **options)
    return assignment, centres, score
