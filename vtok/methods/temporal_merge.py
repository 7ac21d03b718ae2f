"""temporal_merge: a token that says what the last one at its site said joins it; runs become their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.sites import runs

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("temporal_merge", kind="merge")
def temporal_merge(
    tokens: Tensor, layout: Layout, goal: Goal, *, reference: str = "previous", reduce: str = "mean", refresh: int = 0
) -> Merged:
    """Cut each site's tokens into runs of consecutive frames; a run is one row, weighted by its length.

    Under a threshold a token joins the open run of its site when its cosine to the reference is above it (strictly).
    Under a budget of K rows the K tokens least like the one before them open the runs, so that exactly K rows come out;
    below one row a site, sites are dropped whole.

    Args:
        reference: "previous", the token one frame earlier; under a threshold also "last_kept", the one that opened the
            run, or "run_mean", the float32 mean of the run so far (of its rows, whatever ``weights`` each has).
        reduce: what a run becomes, its "mean" or its "first" token.
        refresh: under a threshold every so many frames all tokens open a run; 0 is never.

    Positions are those of the run's first token. Source: what Mavors, DTD and FrameFusion have in common.
    """
    if reduce not in ("mean", "first"):
        raise ValueError(f"method 'temporal_merge': expected reduce 'mean' or 'first', got {reduce!r}")
    if goal.plan is not None:
        if (reference, refresh) != ("previous", 0):
            got = f"reference {reference!r} and refresh {refresh}"
            raise ValueError(f"method 'temporal_merge': expected reference 'previous' under a budget, got {got}")
        keep, similarity = None, ops.temporal_similarity(tokens, layout.cu_seqlens, layout.tokens_per_frame)
    else:
        keep, similarity, *_ = ops.temporal_gate(
            tokens, layout.cu_seqlens, layout.tokens_per_frame, layout.sites, goal.threshold,
            reference=reference, refresh=refresh,
        )  # fmt: skip
    return merge_runs(layout, goal, similarity, keep, reduce)


def merge_runs(
    layout: Layout, goal: Goal, similarity: Tensor, keep: Tensor | None, reduce: str, stride: int = 1
) -> Merged:
    """A run from each row of ``keep`` [S], or from those with the least similarity, to the next one at its site.

    A run of ``keep`` that there is no room for is dropped whole.
    """
    score = 1 - similarity.float()
    if layout.extra_rows:
        score = score.masked_fill(layout.extra_mask(), float("inf"))
    index, cu_seqlens, counts = goal.choose(score, keep)
    return Merged(index, runs(index, layout, stride, keep), cu_seqlens, counts, score, reduce)
