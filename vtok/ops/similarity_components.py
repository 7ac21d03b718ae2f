"""similarity_components: which rows a chain of similar rows connects."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtok.ops import _canonical, _check
from vtok.ops.connected_components import reference as connected_components

SCHEMA = "similarity_components(Tensor rows, Tensor cu_seqlens, float threshold, *, float eps=1e-08) -> Tensor"
CHUNK = 1024  # rows that the reference compares with all others at a time


def similarity_components(rows: Tensor, cu_seqlens: Tensor, threshold: float, *, eps: float = 1e-8) -> Tensor:
    """Label each row with the lowest row of its component, where rows of a group are linked that are alike.

    Two rows of a group are linked where their cosine is above the threshold; components follow the links to their end,
    so that two rows of one may be unlike.

    Args:
        rows: float32, float16, bfloat16 or float64 (rounded to float32 first), shape (S, D). Rows may be strided;
            columns that are not dense are copied first.
        cu_seqlens: int64, shape (G+1,), group g is rows [cu_seqlens[g], cu_seqlens[g+1]); ascending from 0, at most S.
            A group is a frame or a video: rows are never linked across. The device may have decided how many rows there
            are: those beyond the last group are padding, and cost next to nothing.
        threshold: rows are linked where their cosine is greater, strictly, compared in float32; a NaN never is.
        eps: the least denominator of the cosine dot / max(√(|a|²·|b|²), eps), finite, >= 0; exactly 1 for identical
            rows, 0 for a zero row.

    Returns:
        label: int64, shape (S,). The lowest row of each row's component, the row itself where it is alone; -1 beyond
            the last group.

    Raises:
        RuntimeError: wrong rank, dtype or device, NaN as threshold, another eps; on the CPU also boundaries that do not
            ascend. On other devices such boundaries give labels without meaning but never leave the tensors, for
            looking would cost a sync.

    Source: the semantic connected components of LLaVA-Scissor, exact ones. Equivalent, for one group, to ``x =
    torch.nn.functional.normalize(rows.float(), dim=-1)``, ``source, target = (x @ x.T > threshold).nonzero().T`` and
    ``connected_components(source, target, S)``, but no matrix of similarities and no list of edges is ever stored.

    Moves S·D·itemsize + 8·S bytes; S²/2·D multiplications for one group. Class T: sums in float32 in an order that each
    backend fixes for every pair alike, so that equal rows tie exactly and a group is alone; bit-exact where sums are
    exact. Not differentiable. Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.similarity_components(rows, cu_seqlens, threshold, eps=eps)


def check(rows: Tensor, cu_seqlens: Tensor, threshold: float, eps: float) -> None:
    op = "similarity_components"
    _check.expect_dim(op, "rows", rows, 2, "(S, D)")
    _check.expect_float(op, "rows", rows)
    _check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, rows)
    _check.expect(not math.isnan(threshold), op, "threshold to be a number", "nan")
    _check.expect(math.isfinite(eps) and eps >= 0, op, "eps finite and >= 0", f"{eps:g}")


def reference(rows: Tensor, cu_seqlens: Tensor, threshold: float, *, eps: float = 1e-8) -> Tensor:
    check(rows, cu_seqlens, threshold, eps)
    total = rows.shape[0]
    _check.expect_ascending("similarity_components", "cu_seqlens", cu_seqlens, total, "S")
    row = torch.arange(total, device=rows.device)
    group = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    inside = group < cu_seqlens.shape[0] - 1
    x, limit = rows.float(), torch.tensor(threshold, dtype=torch.float64).to(torch.float32)
    norm = x.square().sum(-1)
    edges = [row.new_empty(0, 2)]
    for start in range(0, total, CHUNK):
        part = slice(start, start + CHUNK)
        alike = _canonical.cosine(x[part] @ x.T, norm[part, None], norm, eps) > limit.to(x.device)
        ends = (alike & inside & (group[part, None] == group)).nonzero()
        edges.append(ends + ends.new_tensor([start, 0]))
    source, target = torch.cat(edges).unbind(-1)
    label = connected_components(source, target, total)
    return torch.where(inside, label, -1)


def fake(rows: Tensor, cu_seqlens: Tensor, threshold: float, *, eps: float = 1e-8) -> Tensor:
    check(rows, cu_seqlens, threshold, eps)
    return cu_seqlens.new_empty(rows.shape[0])
