"""temporal_similarity: each token against the same site one frame earlier."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtok.ops import _canonical, _check
from vtok.ops._layout import neighbours

SCHEMA = (
    "temporal_similarity(Tensor tokens, Tensor cu_seqlens, Tensor tokens_per_frame, *, "
    'str metric="cosine", float eps=1e-08) -> Tensor'
)


def temporal_similarity(
    tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, *, metric: str = "cosine", eps: float = 1e-8
) -> Tensor:
    """Score each token by its likeness to the token at the same site one frame earlier.

    Args:
        tokens: float32, float16, bfloat16 or float64, shape (S, D): V videos packed in (video, t, h, w) order. Rows may
            be strided; columns that are not dense are copied first.
        cu_seqlens: int64, shape (V+1,), video v is rows [cu_seqlens[v], cu_seqlens[v+1]); ascending from 0, at most S.
        tokens_per_frame: int64, shape (V,), rows of one frame of each video; 0 or less compares nothing.
        metric: "cosine", dot / max(√(|a|²·|b|²), eps), exactly 1 for identical rows and 0 for a zero row; or "l2", the
            distance -|a - b|. Either way more is more alike.
        eps: the least denominator of the cosine, finite, >= 0.

    Returns:
        float32 (float64 for float64 tokens), shape (S,). Row s of a video with n tokens a frame is compared with row
        s - n. -inf where there is none: a video's first frame, rows outside every video. NaN in a row makes its scores
        NaN; squared norms whose product overflows float32 make a cosine of 0.

    Raises:
        RuntimeError: wrong rank, shape, dtype or device, another metric or eps; on the CPU also boundaries that do not
            ascend. On other devices such rows have unspecified scores, for looking would cost a sync.

    Equivalent, up to the order of the sums, to ``torch.nn.functional.cosine_similarity(x[1:], x[:-1], dim=-1)`` of one
    video's frames ``x`` = (T, n, D) in float32. The score of EVS and its kin, with float32 sums straight from bfloat16.
    The order of the sums is fixed (vtok/ops/_canonical.py).

    Moves S·D·itemsize + 4·S bytes. Class E. Differentiable in ``tokens``: where eps bounds a cosine its norms count as
    constant, and a distance of 0 has gradient 0. Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.temporal_similarity(tokens, cu_seqlens, tokens_per_frame, metric=metric, eps=eps)


def check(tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, metric: str, eps: float) -> None:
    op = "temporal_similarity"
    _check.expect_dim(op, "tokens", tokens, 2, "(S, D)")
    _check.expect_float(op, "tokens", tokens)
    _check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, tokens)
    _check.expect_index(op, "tokens_per_frame", tokens_per_frame, tokens, "(V,)")
    videos = cu_seqlens.shape[0] - 1
    shape = f"tokens_per_frame of shape (V,)=({videos},)"
    _check.expect(tokens_per_frame.shape[0] == videos, op, shape, _check.shape_text(tokens_per_frame))
    _check.expect(metric in ("cosine", "l2"), op, 'metric of "cosine" or "l2"', f'"{metric}"')
    _check.expect(math.isfinite(eps) and eps >= 0, op, "eps finite and >= 0", f"{eps:g}")


def reference(
    tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, *, metric: str = "cosine", eps: float = 1e-8
) -> Tensor:
    check(tokens, cu_seqlens, tokens_per_frame, metric, eps)
    _check.expect_ascending("temporal_similarity", "cu_seqlens", cu_seqlens, tokens.shape[0], "S")
    before, has_before, _, _ = neighbours(tokens.shape[0], cu_seqlens, tokens_per_frame)
    x = _canonical.widen(tokens)
    if metric == "l2":
        difference = x - x[before]
        score = -_canonical.sqrt(_canonical.dot(difference, difference))
    else:
        norm = _canonical.dot(x, x)
        score = _canonical.cosine(_canonical.dot(x, x[before]), norm[before], norm, eps)
    return score.masked_fill(~has_before, -math.inf)


def fake(
    tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, *, metric: str = "cosine", eps: float = 1e-8
) -> Tensor:
    check(tokens, cu_seqlens, tokens_per_frame, metric, eps)
    return tokens.new_empty(tokens.shape[0], dtype=_canonical.accumulator(tokens.dtype))


def setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)
    ctx.metric, ctx.eps = keyword_only_inputs["metric"], keyword_only_inputs["eps"]


def backward(ctx, grad: Tensor):
    """Gathers from both neighbours in time, so that nothing is scattered and the order is fixed."""
    tokens, cu_seqlens, tokens_per_frame, score = ctx.saved_tensors
    before, has_before, after, has_after = neighbours(tokens.shape[0], cu_seqlens, tokens_per_frame)
    x = _canonical.widen(tokens)
    if ctx.metric == "l2":  # d(-|a - b|)/db = (a - b) / |a - b|
        pair = torch.where(has_before & (score != 0), -grad / score, 0)
        own_as_b = own_as_a = -pair
    else:  # dc/db = a / m - c·b / |b|², the second term only where m is the norms' product
        norm = x.square().sum(-1)
        m = (norm[before] * norm).sqrt()
        bounded = m < ctx.eps
        pair = torch.where(has_before, grad / m.clamp(min=ctx.eps), 0)
        own_as_b, own_as_a = (torch.where(has_before & ~bounded, -grad * score / n, 0) for n in (norm, norm[before]))
    own = own_as_b + torch.where(has_after, own_as_a[after], 0)
    later = torch.where(has_after, pair[after], 0)
    d_tokens = own[:, None] * x + pair[:, None] * x[before] + later[:, None] * x[after]
    return d_tokens.to(tokens.dtype), None, None
