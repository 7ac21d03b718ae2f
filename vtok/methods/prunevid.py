"""prunevid: windows of like frames; what is static in one becomes its mean, and static and dynamic tokens cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.packed import sum_members
from vtok.units import Units, expect_budget, frames_of_rows, head_rows, merge_units, share_of, without_frames
from vtok.windows import cluster_windows, frame_means, window_ends

if TYPE_CHECKING:
    from vtok.decide import Goal

WHOLE = 14  # the release clusters groups of more tokens than that


@register("prunevid", kind="merge")
def prunevid(
    tokens: Tensor,
    layout: Layout,
    goal: Goal,
    *,
    similarity: float = 0.8,
    segment_ratio: float = 0.25,
    neighbours: int = 7,
    cluster_ratio: float | None = None,
) -> Merged:
    """Merge the static tokens of each window over time, then cluster them, and the dynamic ones of each frame.

    The frames' means cluster, and the clusters are made contiguous windows. A site is static in a window of several
    frames where the mean cosine of its tokens, each to each other, is above ``similarity`` (strictly). The static
    tokens of a window, temporal means, and the dynamic ones of a frame are a group each. All groups keep the same
    share, so that exactly the budget is kept: the centres of DPC-KNN, the mean of what is nearest to them, a static one
    at the first frame of its window. Under a larger budget than there are such tokens those of static sites follow that
    are least like the one before.

    Args:
        segment_ratio: clusters of frames, as a share of the frames; a float is the decimal that it prints as.
        neighbours: how many the density looks at, the token itself among them, in [1, 64].
        cluster_ratio: the release's share of each group instead, 0.5: a group of 14 or fewer stays whole, a larger one
            keeps that share of it, rounded down. What then is over the budget is dropped, the lowest scores first.

    Departs from the release in this: a window of one frame is all dynamic (there a division by zero decides), densities
    get no noise, and rows come out by position, not window by window, the static ones first. Its pruning by the
    question's attention inside the language model is not vtok's.

    Source: the released code of PruneVid. It has no threshold. Copies the tokens twice.
    """
    plan = expect_budget("prunevid", goal)
    segments = share_of("prunevid", "segment_ratio", segment_ratio)
    if layout.frames == 0:
        return without_frames(goal)
    windows = cluster_windows(frame_means(tokens, layout), layout, ratio=segments, neighbours=neighbours)
    units = Units.of(_static(tokens, windows, layout, similarity), windows, layout)
    quotas = units.quotas(plan)
    if cluster_ratio is not None:
        numerator, denominator = share_of("prunevid", "cluster_ratio", cluster_ratio)
        static, dynamic = (torch.where(n > WHOLE, n * numerator // denominator, n) for n in units.sizes())
        quotas = static, dynamic
    alike = ops.temporal_similarity(tokens, layout.cu_seqlens, layout.tokens_per_frame)
    return merge_units(tokens, goal, units, quotas, 1 - alike.to(torch.float32), neighbours=neighbours)


def _static(tokens: Tensor, windows: Tensor, layout: Layout, similarity: float) -> Tensor:
    """bool [S]: rows whose site is static in their window.

    The cosines of all pairs of w tokens add up to the square of the sum of their unit vectors; w of the pairs are of a
    token with itself.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    norm = torch.linalg.vector_norm(tokens, dim=-1, dtype=wide)
    head = head_rows(windows, layout)
    total, _ = ops.merge(tokens, *ops.group(head, layout.total), torch.where(norm > 0, 1 / norm, 0), reduce="sum")
    same = torch.linalg.vector_norm(total, dim=-1, dtype=wide).square()
    same = same - sum_members(head, layout.total, (norm > 0).to(torch.float32))
    length = (window_ends(windows) - windows)[frames_of_rows(layout)[0]]
    return (length > 1) & (same[head] / (length * (length - 1)).clamp(min=1) > similarity)
