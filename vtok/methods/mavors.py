"""mavors: tokens alike from chunk to chunk, at the same frame and site of it, become their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.methods.temporal_merge import merge_runs

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("mavors", kind="merge")
def mavors(tokens: Tensor, layout: Layout, goal: Goal, *, chunk: int = 16) -> Merged:
    """Compare each token with the one a chunk earlier; runs of those above the threshold (strictly) become their mean.

    Under a budget of K rows the K tokens least like the one a chunk before them open the runs. A last chunk may be
    shorter. The mean stands at the position of its first token.

    Args:
        chunk: frames of a chunk; 1 where each chunk has been encoded into one frame of tokens.

    Source: the paper on Mavors, which names neither the measure, here the cosine, nor the threshold, nor what becomes
    of chains of more than two, here one mean. No release to compare with.
    """
    if chunk < 1:
        raise ValueError(f"method 'mavors': expected chunk >= 1, got {chunk}")
    alike = ops.temporal_similarity(tokens, layout.cu_seqlens, layout.tokens_per_frame * chunk)
    keep = None if goal.plan is not None else ~(alike > goal.threshold)
    return merge_runs(layout, goal, alike, keep, "mean", stride=chunk)
