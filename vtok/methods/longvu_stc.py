"""longvu_stc, LongVU's spatial token compression: of each block of frames the first, and what differs from it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.sites import slots_of

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("longvu_stc", kind="merge")
def longvu_stc(tokens: Tensor, layout: Layout, goal: Goal, *, block: int = 8, most: int | None = None) -> Merged:
    """Drop a token whose cosine to the one at its site in the first frame of its block reaches the threshold.

    Under a budget those least like the first frame of their block are kept, first frames before all. A kept token
    stays as it is; ``assignment`` says which token each dropped one repeats, -1 where that is not kept either.

    Args:
        block: frames of a block.
        most: under a threshold, the release's cap on the rows of a video: one within it is kept whole; one that is over
            it after the drop by some rows loses the last ``ceil(some / blocks)`` of each block, then what is still too
            much at its end. The saner cap is a budget.

    The release's threshold is 0.8 in training (0.6 and 0.7 are defaults in its code). Departs from it in NaN, which is
    like nothing: it is kept here, and so is the next token of its site, with which the rest of the block is compared.

    Source: the released code of LongVU, after its frame selection and query pooling.
    """
    if block < 1 or (most is not None and most < 0):
        raise ValueError(f"method 'longvu_stc': expected block >= 1 and most >= 0, got {block} and {most}")
    if most is not None and goal.plan is not None:
        raise ValueError(f"method 'longvu_stc': expected most under a threshold, got {most} under a budget")
    row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    if layout.videos == 0:
        return Merged(row, row, layout.cu_seqlens)
    # With a reference that only a refresh replaces, every token of a block is compared with its first frame.
    similarity = ops.temporal_gate(
        tokens, layout.cu_seqlens, layout.tokens_per_frame, layout.sites, -math.inf,
        reference="last_kept", refresh=block,
    )[1]  # fmt: skip
    video, sites = layout.video_of(row), layout.tokens_per_frame.clamp(min=1)
    step = (row - layout.cu_seqlens[video]) // sites[video] % block
    extra = layout.extra_mask()
    opens = (step == 0) | extra
    score = (1 - similarity.float()).masked_fill(opens, torch.inf)
    keep = ~(similarity >= goal.threshold) | opens
    if most is not None:
        keep = _capped(keep & ~extra, layout, block, most) | extra
    index, cu_seqlens, counts = goal.choose(score, keep)
    slot = slots_of(index, layout)
    first = torch.where(opens, row, row - step * sites[video])
    assignment = torch.where(slot >= 0, slot, slot[first])
    if goal.plan is None:  # what there is no room for repeats nothing
        assignment = torch.where(keep & (slot < 0), -1, assignment)
    return Merged(index, assignment, cu_seqlens, counts, score, "first")


def _capped(keep: Tensor, layout: Layout, block: int, most: int) -> Tensor:
    """``keep`` bool [S] with the tails of its blocks cut where a video keeps more than ``most``; whole within it."""
    row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    video = layout.video_of(row)
    start, blocks = layout.cu_seqlens[video], -(-layout.cu_frames.diff() // block)
    length = layout.tokens_per_frame * block
    end = torch.minimum(row - (row - start) % length[video].clamp(min=1) + length[video], layout.cu_seqlens[video + 1])
    so_far = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    over = so_far[layout.cu_seqlens].diff() - most
    cut = -(-over // blocks.clamp(min=1))
    kept = keep & ((over <= 0)[video] | (so_far[end] - so_far[row] > cut[video]))
    so_far = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    kept = kept & (so_far[row] - so_far[start] < most)
    return torch.where((layout.grid_rows <= most)[video], True, kept)
