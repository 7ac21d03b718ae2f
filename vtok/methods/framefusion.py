"""framefusion: runs of tokens alike from frame to frame become their mean; then the least important of them go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.methods.temporal_merge import merge_runs
from vtok.sites import runs

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("framefusion", kind="merge")
def framefusion(
    tokens: Tensor, layout: Layout, goal: Goal, *, similarity: float = 0.6, importance: Tensor | None = None
) -> Merged:
    """Merge a token into the run of its site when its cosine to the one a frame earlier is not below the threshold.

    Under a budget of K rows: where the pairs at or above ``similarity`` suffice, the N - K most alike of them merge,
    exactly. Where they do not, all of them merge, and of the runs the K most important stay; the others are dropped
    with all that they hold.

    Args:
        similarity: under a budget, the least cosine at which tokens merge; above 0.
        importance: under a budget, [S], how much each token matters, not negative, such as the attention that it draws,
            of which the first of a run speaks for the run. Without it a token matters that is unlike the one before.

    A run is the mean of its tokens in float32, at the position of its first. Departs from the release in this: it adds
    up and counts in the tokens' dtype, which goes wrong on long runs in bfloat16; its budget is a cost in operations,
    met over some layers of the language model, each a round of its own on what the last one left.

    Source: the released code of FrameFusion.
    """
    alike = ops.temporal_similarity(tokens, layout.cu_seqlens, layout.tokens_per_frame)
    if layout.extra_rows:
        alike = alike.masked_fill(layout.extra_mask(), -torch.inf)
    if goal.plan is None:
        if importance is not None:
            raise ValueError("method 'framefusion': expected importance under a budget, got it under a threshold")
        return merge_runs(layout, goal, alike, ~(alike >= goal.threshold), "mean")
    if not similarity > 0:
        raise ValueError(f"method 'framefusion': expected similarity above 0, got {similarity}")
    opens = ~(alike >= similarity)
    score = torch.where(opens, _importance(importance, alike, layout), -alike.float())  # below 0 what may merge
    index, cu_seqlens, counts = goal.choose(score)
    return Merged(index, runs(index, layout, opens=opens), cu_seqlens, counts, score)


def _importance(given: Tensor | None, alike: Tensor, layout: Layout) -> Tensor:
    """float32 [S], not negative; +inf for the rows after the grids."""
    if given is None:
        return 1 - alike.float()
    if not given.is_floating_point() or given.shape != alike.shape:
        got = f"{given.dtype} {tuple(given.shape)}"
        raise ValueError(f"method 'framefusion': expected importance of floats [{layout.total}], got {got}")
    given = given.detach().to(torch.float32).clamp(min=0)
    return given.masked_fill(layout.extra_mask(), torch.inf) if layout.extra_rows else given
