"""Rows that each point at a lower one, down to where they end: what joins what, once it is known which rows are kept.

Index space alone, without a sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.sites import slots_of


def joined(into: Tensor, index: Tensor, layout: Layout) -> Tensor:
    """int64 [S]: which of the kept rows ``index`` [K] each row comes to first, itself before all; -1 where to none.

    Args:
        into: int64 [S], the row that each row would join: a lower one, or itself where the way ends.
    """
    slot = slots_of(index, layout)
    row = torch.arange(layout.total, dtype=torch.int64, device=index.device)
    return slot[ops.connected_components(row, torch.where(slot >= 0, -1, into), layout.total)]


def before(layout: Layout, part: Tensor) -> tuple[Tensor, Tensor]:
    """Where the ways go on that end in each part of a frame.

    Args:
        part: int64 [S], the lowest row of the part of its frame that each row is in.

    Returns:
        int64 [S], the part at the row's site one frame earlier; in the first frame that of the row before it in reading
        order; the row itself for a video's first row and after the grid. bool [S], the rows with an earlier frame.
    """
    row = torch.arange(layout.total, dtype=torch.int64, device=part.device)
    video = layout.video_of(row)
    place, sites = row - layout.cu_seqlens[video], layout.tokens_per_frame[video]
    inside = place < layout.grid_rows[video]
    later = inside & (place >= sites)
    there = torch.where(later, row - sites, torch.where(inside, (row - 1).clamp(min=0), row))
    return torch.where(inside & (place > 0), part[there], row), later


def likeness(x: Tensor, layout: Layout) -> Tensor:
    """float32 [S]: the cosine of each row to what ``before`` leads to; -inf for a video's first row and extra rows."""
    ones = torch.ones_like(layout.tokens_per_frame)
    earlier = ops.temporal_similarity(x, layout.cu_seqlens, layout.tokens_per_frame)
    beside = ops.temporal_similarity(x, layout.cu_seqlens, ones)
    alike = torch.where(earlier == -torch.inf, beside, earlier).float()
    return alike.masked_fill(layout.extra_mask(), -torch.inf) if layout.extra_rows else alike


def ranked(alike: Tensor, first: Tensor, second: Tensor, within: Tensor) -> Tensor:
    """float32 [S], the largest kept: rows of ``first``, then of ``second``, then others, each the least alike first.

    Args:
        alike: float32 [S], a cosine, of the others ``within``. NaN stays NaN, and so comes last of all.
    """
    return torch.where(first, 1 - alike, torch.where(second, -2 - alike, -5 - within))
