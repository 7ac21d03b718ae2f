"""The retention mask of the serving engines' video pruning (EVS), and the count that they plan with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok.compress import compress
from vtok.layout import host_grids, whole_number


def retained_tokens_count(tokens_per_frame: int, num_frames: int, q: float) -> int:
    """Rows that the engines keep at the pruning rate ``q``: ``max(n, int(T·n·(1 - q)))`` in Python doubles.

    Their binary rule on purpose, not vtok's decimal one: 3840 rows at 0.9 give 383. Source: the rule of vLLM 0.33,
    SGLang, TensorRT-LLM and transformers. Raises ValueError for q outside [0, 1).
    """
    sites = whole_number("tokens_per_frame", tokens_per_frame, least=0)
    rows = sites * whole_number("num_frames", num_frames, least=0)
    if not 0 <= q < 1:
        raise ValueError(f"expected q in [0, 1), got {q}")
    return max(sites, int(rows * (1 - q)))


def retention_mask(
    video_embeds: Tensor, video_size_thw: Any, spatial_merge_size: int, q: float, *, compat: str | None = None
) -> Tensor:
    """Which rows of one video stay at the pruning rate ``q``; takes the place of the engines' own function.

    Args:
        video_embeds: [N, D] floats, rows in (t, h, w) order.
        video_size_thw: (T, H, W) on the host before the spatial merge: ints or a CPU tensor.
        spatial_merge_size: H and W are divided by it.
        q: fraction to prune, in [0, 1).
        compat: None scores in float32; "vllm" in the dtype of the embeddings, as the engines do.

    Returns:
        bool [N], exactly ``min(N, retained_tokens_count(n, T, q))`` True. The first frame is always kept. Never syncs.
    """
    size = (
        video_size_thw.tolist() if isinstance(video_size_thw, Tensor) and _on_host(video_size_thw) else video_size_thw
    )
    ((t, h, w),) = host_grids([size], spatial_merge_size)
    budget = retained_tokens_count(h * w, t, q)
    if budget == 0:
        return torch.zeros(video_embeds.shape[0], dtype=torch.bool, device=video_embeds.device)
    return compress(video_embeds, [(t, h, w)], budget=budget, compat=compat).mask


def _on_host(size: Tensor) -> bool:
    if size.device.type != "cpu":
        raise ValueError(f"expected video_size_thw on the host, got a tensor on {size.device}")
    return True
