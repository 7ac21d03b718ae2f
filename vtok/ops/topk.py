"""topk: the best rows of each segment."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.ops import _check

SCHEMA = "topk(Tensor scores, Tensor cu_seqlens, Tensor cu_k, SymInt k, *, bool largest=True) -> Tensor"


def topk(scores: Tensor, cu_seqlens: Tensor, cu_k: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """Choose the best rows of each segment, in ascending order.

    Rows compare by score, then by lower row: exactly ``min(k_v, n_v)`` of the ``n_v`` rows of segment v are chosen,
    whatever the ties. -0 equals +0; NaN comes after every number, largest or smallest.

    Args:
        scores: float32, shape (S,).
        cu_seqlens: int64, shape (V+1,), ascending from 0 to at most S: segment v is the rows
            [cu_seqlens[v], cu_seqlens[v+1]). Rows beyond the last segment are never chosen.
        cu_k: int64, shape (V+1,), ascending from 0: segment v fills the slots [cu_k[v], cu_k[v+1]) of the output, so
            ``k_v = cu_k[v+1] - cu_k[v]``.
        k: slots of the output; those at or beyond it are cut off.
        largest: choose the largest scores, or else the smallest.

    Returns:
        int64, shape (k,): row indices into ``scores``, ascending inside each segment. Slots that a segment of fewer
        than k_v rows leaves over, and those beyond cu_k[V], are -1.

    Raises:
        RuntimeError: wrong rank, shape, dtype or device, or k < 0; on the CPU also boundaries that are not ascending
            from 0, and on CUDA 2^32 scores or more. On other devices the rows and slots that such boundaries name
            beyond the tensors are left out, for looking would cost a sync.

    Source: the retention mask of EVS, the first K of a stable descending argsort, here for each segment. Equivalent,
    for one segment, to ``scores.argsort(descending=largest, stable=True)[:k].sort().values``.

    Moves 4·S + 8·k + 16·V bytes. Class E. Not differentiable. Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.topk(scores, cu_seqlens, cu_k, k, largest=largest)


def check(scores: Tensor, cu_seqlens: Tensor, cu_k: Tensor, k: int) -> None:
    _check.expect_dim("topk", "scores", scores, 1, "(S,)")
    _check.expect_dtype("topk", "scores", scores, torch.float32)
    _check.expect_cu_seqlens("topk", "cu_seqlens", cu_seqlens, scores)
    _check.expect_index("topk", "cu_k", cu_k, scores, "(V+1,)")
    shape = f"cu_k of shape (V+1,)={_check.shape_text(cu_seqlens)}"
    _check.expect(cu_k.shape[0] == cu_seqlens.shape[0], "topk", shape, _check.shape_text(cu_k))
    _check.expect(k >= 0, "topk", "k >= 0", k)


def order_keys(scores: Tensor, largest: bool) -> Tensor:
    """int64 keys that grow with how good a score is; -0 and +0 share one, NaN has the least."""
    bits = (torch.where(scores.isnan(), 0, scores if largest else -scores) + 0.0).view(torch.int32).long()
    return torch.where(scores.isnan(), -(2**31), torch.where(bits < 0, -(2**31) - bits, bits))


def reference(scores: Tensor, cu_seqlens: Tensor, cu_k: Tensor, k: int, *, largest: bool = True) -> Tensor:
    check(scores, cu_seqlens, cu_k, k)
    _check.expect_ascending("topk", "cu_seqlens", cu_seqlens, scores.shape[0], "S")
    _check.expect_ascending("topk", "cu_k", cu_k)
    segments = cu_k.shape[0] - 1
    out = cu_k.new_full((k + 1,), -1)  # the last slot takes what is cut off
    if segments and scores.shape[0]:
        rows = torch.arange(scores.shape[0], device=scores.device)
        segment = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
        order = (segment * 2**33 - order_keys(scores, largest)).argsort(stable=True)
        inside, segment = segment < segments, segment.clamp(max=segments - 1)
        rank = torch.empty_like(order).scatter_(0, order, rows) - cu_seqlens[segment]  # 0 is the segment's best
        kept = inside & (rank < (cu_k[1:] - cu_k[:-1])[segment])
        before = kept.cumsum(0) - kept.long()
        slot = cu_k[segment] + before - before[cu_seqlens[segment]]
        out.scatter_(0, torch.where(kept & (slot < k), slot, k), torch.where(kept, rows, -1))
    return out[:k].clone()


def fake(scores: Tensor, cu_seqlens: Tensor, cu_k: Tensor, k: int, *, largest: bool = True) -> Tensor:
    check(scores, cu_seqlens, cu_k, k)
    return cu_k.new_empty(k)
