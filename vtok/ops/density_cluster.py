"""density_cluster: the rows of each group that lie densest and far from denser ones, and who is nearest to which."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vtok.ops import _check
from vtok.ops.topk import order_keys

SCHEMA = (
    "density_cluster(Tensor rows, Tensor cu_seqlens, Tensor cu_k, SymInt k, *, int neighbours=7, Tensor? valid=None) "
    "-> (Tensor assignment, Tensor centres, Tensor score)"
)
MOST_NEIGHBOURS = 64
CHUNK = 1024  # rows that the reference compares with all others at a time


def density_cluster(
    rows: Tensor, cu_seqlens: Tensor, cu_k: Tensor, k: int, *, neighbours: int = 7, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster each group of rows by density peaks of nearest neighbours (DPC-KNN).

    With d_ij = |x_i - x_j| / √D between the rows of a group that take part: the density ρ_i is exp(-m_i), m_i the mean
    of the ``min(neighbours, n)`` least d_ij², its own 0 among them; δ_i is the least d_ij to a denser row, and of the
    densest row the largest distance between any two. Denser is who has the smaller m, or an equal one and the lower
    index. The centres are the rows with the largest ρ·δ, ties to the lower index, NaN last; every row joins the
    nearest centre, ties to the lower slot, a centre itself.

    Args:
        rows: float32, float16, bfloat16 or float64 (rounded to float32 first), shape (S, D). Rows may be strided;
            columns that are not dense are copied first.
        cu_seqlens: int64, shape (V+1,), group v is rows [cu_seqlens[v], cu_seqlens[v+1]); ascending from 0, at most S.
            A group is a frame, a window or a video: rows never cluster across.
        cu_k: int64, shape (V+1,), ascending from 0: group v fills the slots [cu_k[v], cu_k[v+1]) of the output with as
            many centres as it has slots, or as it has rows that take part.
        k: slots of the output; those at or beyond it are cut off.
        neighbours: in [1, 64], the row itself counted.
        valid: bool, shape (S,): the rows that take part; all without it. Others are nobody's neighbour or centre.

    Returns:
        assignment: int64, shape (S,): the slot of each row's centre, 0 to k-1; -1 for rows that take no part, outside
            every group, or in a group without a centre.
        centres: int64, shape (k,): rows, ascending inside each group's slots, then -1.
        score: float32, shape (S,): ln(ρ·δ) = ln δ - m, which keeps its order where exp(-m) has no value but 0; -inf
            also for the rows that no group has. The published order of centres is by descending score.

    Raises:
        RuntimeError: wrong rank, shape, dtype or device, k < 0, neighbours outside [1, 64]; on the CPU also boundaries
            that do not ascend, and on CUDA 2^32 rows or more. On other devices such boundaries give clusters without
            meaning but never leave the tensors, for looking would cost a sync.

    A distance that is NaN counts as infinite: a row with NaN is last of all to become a centre, and joins the first.

    Source: DPC-KNN as FastVID, PruneVid, HoliTom and FlashVID have it, without the random noise that each adds to the
    density, so that ties are settled by index. Equivalent, for one group without ties, to ``d = torch.cdist(x, x) /
    D**0.5``, ``density = (-d.topk(neighbours, largest=False).values.square().mean(-1)).exp()``, ``delta =
    torch.where(density > density[:, None], d, torch.inf).amin(-1).clamp(max=d.max())``, ``centres = (density *
    delta).topk(k).indices`` and ``assignment = d[:, centres].argmin(-1)``, but no matrix of distances is ever stored.

    Why differences: Σ(x_i - x_j)² is exactly 0 for identical rows and loses nothing for rows that are nearly so, where
    |x_i|² + |x_j|² - 2·x_i·x_j cancels.

    Moves S·D·itemsize + 12·S + 8·k bytes. Distances are computed again where they are needed again: all S²/V pairs for
    the density, those of the rows that have no denser row nearest to them, and S·k/V to the centres. Class T: sums in
    float32 in an order that each backend fixes for every pair alike; bit-exact where they are exact, for the logarithm
    is spelled out. Not differentiable. Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.density_cluster(rows, cu_seqlens, cu_k, k, neighbours=neighbours, valid=valid)


def check(
    rows: Tensor, cu_seqlens: Tensor, cu_k: Tensor, k: int, neighbours: int = 7, valid: Tensor | None = None
) -> None:
    op = "density_cluster"
    _check.expect_dim(op, "rows", rows, 2, "(S, D)")
    _check.expect_float(op, "rows", rows)
    _check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, rows)
    _check.expect_index(op, "cu_k", cu_k, rows, "(V+1,)")
    shape = f"cu_k of shape (V+1,)={_check.shape_text(cu_seqlens)}"
    _check.expect(cu_k.shape[0] == cu_seqlens.shape[0], op, shape, _check.shape_text(cu_k))
    _check.expect(k >= 0, op, "k >= 0", k)
    _check.expect(1 <= neighbours <= MOST_NEIGHBOURS, op, f"neighbours in [1, {MOST_NEIGHBOURS}]", neighbours)
    if valid is not None:
        _check.expect_dim(op, "valid", valid, 1, "(S,)")
        count = rows.shape[0]
        _check.expect(valid.shape[0] == count, op, f"valid of shape (S,)=({count},)", _check.shape_text(valid))
        _check.expect_dtype(op, "valid", valid, torch.bool)
        _check.expect_same_device(op, "valid", valid, rows)


def log(x: Tensor) -> Tensor:
    """ln x of positive float32 numbers, every operation rounded: the same bits on every backend."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).view(torch.float32)  # in [√½, √2)
    s = (mantissa - 1) / (mantissa + 1)
    w = s * s
    series = (((w * (1 / 9) + 1 / 7) * w + 1 / 5) * w + 1 / 3) * w + 1
    return exponent.float() * math.log(2) + (s + s) * series


def score_of(mean: Tensor, nearest: Tensor, D: int) -> Tensor:
    """ln δ - m of the squared distance to the nearest denser row, D times too large."""
    x = nearest / D
    return torch.where(x == 0, -math.inf, torch.where(x == math.inf, math.inf, log(x) * 0.5)) - mean


def squares(x: Tensor, others: Tensor, allowed: Tensor, start: int) -> Tensor:
    """float32 [C, N], |x_i - others_j|² of some rows, in float64 and rounded; infinite where not allowed or NaN."""
    d = torch.cdist(x[start : start + CHUNK], others, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(allowed, d.square().float().nan_to_num(math.inf, math.inf), math.inf)


def reference(
    rows: Tensor, cu_seqlens: Tensor, cu_k: Tensor, k: int, *, neighbours: int = 7, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check(rows, cu_seqlens, cu_k, k, neighbours, valid)
    S, D = rows.shape[0], max(rows.shape[1], 1)
    _check.expect_ascending("density_cluster", "cu_seqlens", cu_seqlens, S, "S")
    _check.expect_ascending("density_cluster", "cu_k", cu_k)
    segments = cu_k.shape[0] - 1
    row = torch.arange(S, device=rows.device)
    group = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    group = torch.where(group < segments if valid is None else valid & (group < segments), group, segments)
    x = rows.float().double()

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, S, CHUNK):
            part = slice(start, start + CHUNK)
            yield part, (group[part, None] == group) & (group[part, None] < segments)

    mean, nearest = x.new_zeros(S, dtype=torch.float32), x.new_zeros(S, dtype=torch.float32)
    farthest = x.new_zeros(segments + 1, dtype=torch.float32)
    for part, allowed in chunks():
        q = squares(x, x, allowed, part.start)
        least = q.topk(min(neighbours, S), largest=False).values
        number = allowed.sum(-1, keepdim=True).clamp(1, neighbours)
        among = torch.arange(least.shape[1], device=rows.device) < number
        mean[part] = torch.where(among, least, 0).sum(-1) / (number[:, 0] * D).float()
        most = torch.where(allowed, q, 0).amax(-1)
        farthest = farthest.scatter_reduce(0, group[part], most, "amax")
    for part, allowed in chunks():
        denser = (mean < mean[part, None]) | (mean == mean[part, None]) & (row < row[part, None])
        q = squares(x, x, allowed & denser, part.start)
        nearest[part] = torch.where((allowed & denser).any(-1), q.amin(-1), farthest[group[part]])
    score = torch.where(group < segments, score_of(mean, nearest, D), -math.inf)

    centres = choose(score, group, cu_k, k)
    assignment = torch.full_like(row, -1)
    if k:
        centre = centres.clamp(min=0)
        for part, _ in chunks() if S else ():
            allowed = (centres >= 0) & (group[part, None] == group[centre])
            q = squares(x, x[centre], allowed, part.start).masked_fill(centres == row[part, None], -1)
            first = (allowed & (q == q.amin(-1, keepdim=True))).byte().argmax(-1)  # the lowest slot of equals
            assignment[part] = torch.where(allowed.any(-1), first, -1)
    return assignment, centres, score


def choose(score: Tensor, group: Tensor, cu_k: Tensor, k: int) -> Tensor:
    """int64 [k], the rows with the best scores of each group, ascending in its slots; the last group has none."""
    segments, row = cu_k.shape[0] - 1, torch.arange(score.shape[0], device=score.device)
    sizes = torch.zeros(segments + 1, dtype=torch.int64, device=score.device).scatter_add(
        0, group, torch.ones_like(row)
    )
    order = (group * 2**33 - order_keys(score, True)).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, row) - (sizes.cumsum(0) - sizes)[group]  # 0 is the group's best
    wanted, slot = torch.nn.functional.pad(cu_k.diff(), (0, 1)), torch.nn.functional.pad(cu_k[:-1], (0, 1))
    kept = rank < wanted[group]
    taken = torch.zeros_like(sizes).scatter_add(0, group, kept.long())
    slot = (slot - (taken.cumsum(0) - taken))[group] + kept.cumsum(0) - 1
    out = cu_k.new_full((k + 1,), -1)  # the last slot takes what is cut off
    out.scatter_(0, torch.where(kept & (slot < k), slot, k), torch.where(kept & (slot < k), row, -1))
    return out[:k].clone()


def fake(
    rows: Tensor, cu_seqlens: Tensor, cu_k: Tensor, k: int, *, neighbours: int = 7, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check(rows, cu_seqlens, cu_k, k, neighbours, valid)
    count = rows.shape[0]
    return cu_seqlens.new_empty(count), cu_k.new_empty(k), rows.new_empty(count, dtype=torch.float32)
