"""temporal_similarity in Triton: a program takes a few rows and those one frame earlier, still in the L2 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _canonical, _rooms
from vtok.triton_kernels._canonical import LANES, SEGMENT, STEPS, cosine, fold, sqrt_rn


@triton.jit
def row_before(s, cu_seqlens, tokens_per_frame, videos, depth):
    """The row each of ``s`` is compared with, and whether there is one; any layout leads to rows in [0, s]."""
    low = s * 0
    high = low + videos  # the video `videos` is what lies beyond the last one
    for _ in range(depth):
        middle = (low + high) // 2
        open_ = low < high
        after = tl.load(cu_seqlens + middle + 1, mask=open_, other=0) <= s
        low = tl.where(open_ & after, middle + 1, low)
        high = tl.where(open_ & (after == 0), middle, high)
    inside = low < videos
    n = tl.load(tokens_per_frame + low, mask=inside, other=0)
    first = tl.load(cu_seqlens + low, mask=inside, other=0)
    before = s - tl.minimum(tl.maximum(n, 0), s + 1)
    has_before = inside & (n > 0) & (before >= tl.maximum(first, 0))
    return tl.where(has_before, before, s), has_before


@triton.jit
def similarity_kernel(
    tokens, cu_seqlens, tokens_per_frame, scores, rows, D, stride, videos, depth, eps,
    L2: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    before, has_before = row_before(s, cu_seqlens, tokens_per_frame, videos, depth)
    has_before = has_before & (s < rows)
    lane = tl.arange(0, LANES)
    a_row = tokens + (before * stride)[:, None] + lane[None, :]  # [ROWS, LANES]
    b_row = tokens + (s * stride)[:, None] + lane[None, :]
    dot = tl.full((ROWS, LANES), 0, ACC)  # or |a - b|²
    norm_a = tl.full((ROWS, LANES), 0, ACC)
    norm_b = tl.full((ROWS, LANES), 0, ACC)
    for start in range(0, D, SEGMENT):
        dot_part = tl.full((ROWS, LANES), 0, ACC)
        a_part = tl.full((ROWS, LANES), 0, ACC)
        b_part = tl.full((ROWS, LANES), 0, ACC)
        for step in tl.static_range(STEPS):
            i = start + step * LANES
            mask = has_before[:, None] & (lane < D - i)[None, :]
            a = tl.load(a_row + i, mask=mask, other=0).to(ACC)
            b = tl.load(b_row + i, mask=mask, other=0).to(ACC)
            if L2:
                difference = b - a
                dot_part += difference * difference
            else:
                dot_part += a * b
                a_part += a * a
                b_part += b * b
        dot += dot_part
        norm_a += a_part
        norm_b += b_part
    if L2:
        score = -sqrt_rn(fold(dot, ROWS))
    else:
        score = cosine(fold(dot, ROWS), fold(norm_a, ROWS), fold(norm_b, ROWS), tl.cast(eps, ACC))
    tl.store(scores + s, tl.where(has_before, score, float("-inf")), mask=s < rows)


def temporal_similarity(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tokens_per_frame: torch.Tensor,
    *,
    metric: str = "cosine",
    eps: float = 1e-8,
) -> torch.Tensor:
    _rooms.ROOMS["temporal_similarity"].check(tokens, cu_seqlens, tokens_per_frame, metric, eps)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    (rows, D), videos = tokens.shape, tokens_per_frame.shape[0]
    ROWS = 32 // tokens.element_size()  # what the registers hold
    scores = tokens.new_empty(rows, dtype=_canonical.accumulator(tokens.dtype))
    if rows:
        similarity_kernel[(triton.cdiv(rows, ROWS),)](
            tokens, cu_seqlens.contiguous(), tokens_per_frame.contiguous(), scores, rows, D, tokens.stride(0), videos,
            videos.bit_length(), eps, L2=metric == "l2",
            ACC=tl.float64 if tokens.dtype == torch.float64 else tl.float32, ROWS=ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return scores
