"""EVS, efficient video sampling: what changed since the previous frame is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import register

if TYPE_CHECKING:
    from vtok.decide import Plan


@register("evs")
def evs(tokens: Tensor, layout: Layout, plan: Plan | None, *, compat: str | None = None) -> Tensor:
    """1 - cosine to the row at the same site one frame earlier, kept or not; +inf in a first frame.

    ``compat="vllm"`` computes the cosine in the dtype of the tokens with 255 in first frames, as the serving engines
    do: many exact ties in bfloat16, and some other rows kept than with the float32 scores. It copies the tokens once.

    Source: the rule of vLLM 0.33, SGLang and TensorRT-LLM (retention mask of video pruning). Returns float32 [S].
    """
    if not tokens.is_floating_point():
        raise TypeError(f"method 'evs': expected tokens of a floating dtype, got {tokens.dtype}")
    if compat is None:
        similarity = ops.temporal_similarity(tokens, layout.cu_seqlens, layout.tokens_per_frame)
        return similarity.neg_().add_(1).to(torch.float32)  # in place: no second number per row
    if compat != "vllm":
        raise ValueError(f"method 'evs': expected compat None or 'vllm', got {compat!r}")
    first, before = _first_frames(layout)
    score = 1 - torch.nn.functional.cosine_similarity(tokens, tokens[before], dim=-1)
    return torch.where(first, 255, score).to(torch.float32)


def _first_frames(layout: Layout) -> tuple[Tensor, Tensor]:
    """(bool [S] rows of first frames, int64 [S] the row one frame earlier, or the row itself in those)."""
    row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    video = layout.video_of(row)
    before = row - layout.tokens_per_frame[video]
    first = before < layout.cu_seqlens[video]
    return first, torch.where(first, row, before)
