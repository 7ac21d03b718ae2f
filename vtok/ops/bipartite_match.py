"""bipartite_match: the destination row that each source row is most alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtok.ops import _canonical, _check

SCHEMA = (
    "bipartite_match(Tensor rows, Tensor cu_seqlens, *, int split=2, int protected=0, float eps=1e-08) "
    "-> (Tensor best, Tensor target)"
)
CHUNK = 1024  # rows that the reference compares with all others at a time


def bipartite_match(
    rows: Tensor, cu_seqlens: Tensor, *, split: int = 2, protected: int = 0, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """Find for each source row of a segment the destination row with the largest cosine.

    Row i of a segment, counted from 0, is a destination where ``i % split == split - 1``, else a source: for 2 the even
    rows look among the odd ones (ToMe), for k > 2 every k-th row receives (ToMe's kth_bipartite, which leaves out the
    rows after the last whole k; here they are sources).

    Args:
        rows: float32, float16, bfloat16 or float64 (rounded to float32 first), shape (S, D): what is compared, such as
            attention keys. Rows may be strided; columns that are not dense are copied first.
        cu_seqlens: int64, shape (V+1,), segment v is rows [cu_seqlens[v], cu_seqlens[v+1]); ascending from 0, at most
            S. A segment is a video, a frame or a clip: rows never match across.
        split: at least 2.
        protected: the first rows of each segment that neither look nor receive (a class token), at least 0.
        eps: the least denominator of the cosine, finite, >= 0.

    Returns:
        best: float32, shape (S,). Of a source the largest dot / max(√(|a|²·|b|²), eps); exactly 1 for identical rows, 0
            for a zero row; NaN only where every destination gives NaN. -inf for every other row, and for a source
            whose segment has no destination.
        target: int64, shape (S,). Of a source the row in ``rows`` that gave ``best``, the lowest of equals, -1 where
            there is none; every other row's target is itself. Rows outside every segment are none's.

    Raises:
        RuntimeError: wrong rank, dtype or device, a split below 2, protected below 0, another eps; on the CPU also
            boundaries that do not ascend, and on CUDA 2^32 rows or more. On other devices such boundaries give matches
            without meaning but never leave the tensors, for looking would cost a sync.

    Why no assignment: which sources merge is the r best of each segment, which ``topk`` of ``best`` says, and r may
    change where the match stays; ``vtok.methods.tome`` joins the two.

    Source: the rule of ToMe's bipartite soft matching. Equivalent, for one segment without ties, to ``x =
    torch.nn.functional.normalize(rows.float(), dim=-1)`` and ``best, j = (x[0::2] @ x[1::2].T).max(-1)`` with targets
    ``2·j + 1``, but no matrix of similarities is ever stored: tiles of it live in registers.

    Moves S·D·itemsize + 12·S bytes; S²/4·D multiplications for one segment. Class T: sums in float32 in an order that
    each backend fixes for every pair alike, so that equal rows tie exactly and a segment is alone; bit-exact where sums
    are exact. Not differentiable. Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.bipartite_match(rows, cu_seqlens, split=split, protected=protected, eps=eps)


def check(rows: Tensor, cu_seqlens: Tensor, split: int, protected: int, eps: float) -> None:
    op = "bipartite_match"
    _check.expect_dim(op, "rows", rows, 2, "(S, D)")
    _check.expect_float(op, "rows", rows)
    _check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, rows)
    _check.expect(split >= 2, op, "split >= 2", split)
    _check.expect(protected >= 0, op, "protected >= 0", protected)
    _check.expect(math.isfinite(eps) and eps >= 0, op, "eps finite and >= 0", f"{eps:g}")


def roles(rows: int, cu_seqlens: Tensor, split: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """(int64 [S] the segment of each row, V beyond the last; bool [S] the sources; bool [S] the destinations)."""
    row = torch.arange(rows, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    local = row - cu_seqlens[segment]
    takes_part = (segment < cu_seqlens.shape[0] - 1) & (local >= protected)
    receives = local % split == split - 1
    return segment, takes_part & ~receives, takes_part & receives


def reference(
    rows: Tensor, cu_seqlens: Tensor, *, split: int = 2, protected: int = 0, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    check(rows, cu_seqlens, split, protected, eps)
    total = rows.shape[0]
    _check.expect_ascending("bipartite_match", "cu_seqlens", cu_seqlens, total, "S")
    segment, source, destination = roles(total, cu_seqlens, split, protected)
    best, target = rows.new_full((total,), -math.inf, dtype=torch.float32), torch.arange(total, device=rows.device)
    x = rows.float()
    norm = x.square().sum(-1)
    for start in range(0, total, CHUNK):
        part = slice(start, start + CHUNK)
        allowed = destination & (segment[part, None] == segment)
        similarity = _canonical.cosine(x[part] @ x.T, norm[part, None], norm, eps)
        rank = torch.where(similarity.isnan(), -math.inf, similarity).masked_fill(~allowed, -math.inf)
        top = rank.amax(-1, keepdim=True)
        real = allowed & ~similarity.isnan()
        none = ~real.any(-1, keepdim=True)
        first = (torch.where(none, allowed, real & (rank == top))).byte().argmax(-1)  # the lowest of equals
        found = torch.where(none, math.nan, top)[:, 0] + 0.0
        some = allowed.any(-1)
        best[part] = torch.where(source[part] & some, found, -math.inf)
        target[part] = torch.where(source[part], torch.where(some, first, -1), target[part])
    return best, target


def fake(
    rows: Tensor, cu_seqlens: Tensor, *, split: int = 2, protected: int = 0, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    check(rows, cu_seqlens, split, protected, eps)
    return rows.new_empty(rows.shape[0], dtype=torch.float32), cu_seqlens.new_empty(rows.shape[0])
