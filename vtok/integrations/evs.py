"""The retention mask of the serving engines' video pruning (EVS), and the count that they plan with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok import methods
from vtok.compress import as_rows, score_rows
from vtok.decide import Plan, select
from vtok.layout import whole_number


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
    video_embeds: Tensor,
    video_size_thw: Any,
    spatial_merge_size: int,
    q: float,
    *,
    method: str = "evs",
    **options: Any,
) -> Tensor:
    """Which rows of one video stay at the pruning rate ``q``; takes the place of the engines' own function.

    Args:
        video_embeds: [N, D] floats, rows in (t, h, w) order.
        video_size_thw: (T, H, W) on the host before the spatial merge: ints or a CPU tensor.
        spatial_merge_size: H and W are divided by it.
        q: fraction to prune, in [0, 1).
        method: a name in ``vtok.methods.names()``; ``options`` are its own. For "evs", ``compat="vllm"`` scores in the
            dtype of the embeddings, as the engines do, instead of float32.

    Returns:
        bool [N] with exactly ``min(N, retained_tokens_count(n, T, q))`` True; "evs" keeps all of the first frame.
        Never syncs.

    Raises ValueError or TypeError: a size on the device, embeddings of another number of rows, an unknown option.
    """
    size = (
        video_size_thw.tolist() if isinstance(video_size_thw, Tensor) and _on_host(video_size_thw) else video_size_thw
    )
    rows, layout = as_rows(video_embeds, [size], spatial_merge_size, 0)
    ((t, h, w),) = layout.grids
    plan = Plan.of(layout, budget=[retained_tokens_count(h * w, t, q)])
    scores = score_rows(rows, layout, plan, methods.get(method, "score"), None, options)
    mask = torch.zeros(layout.total, dtype=torch.bool, device=layout.device)
    return mask.index_fill(0, select(scores, plan), True)


def _on_host(size: Tensor) -> bool:
    if size.device.type != "cpu":
        raise ValueError(f"expected video_size_thw on the host, got a tensor on {size.device}")
    return True
