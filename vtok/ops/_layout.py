"""Which rows of a packed batch compare with which, from cu_seqlens [V+1] and tokens_per_frame [V], without a sync."""

from __future__ import annotations

import torch
from torch import Tensor


def neighbours(rows: int, cu_seqlens: Tensor, tokens_per_frame: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same site one frame earlier and one frame later, of each row: (before, has_before, after, has_after).

    ``before`` and ``after`` are int64 [rows]; where the row has no such neighbour they name the row itself. Rows beyond
    the last video, and those of a video whose frame has no row, have none.
    """
    row = torch.arange(rows, device=cu_seqlens.device)
    video = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)  # V: beyond the last video
    stride = torch.cat([tokens_per_frame, tokens_per_frame.new_zeros(1)])[video]
    first, end = cu_seqlens[video], torch.cat([cu_seqlens[1:], cu_seqlens[-1:]])[video]
    has_before = (stride > 0) & (row - stride >= first)
    has_after = (stride > 0) & (stride < end - row)
    return torch.where(has_before, row - stride, row), has_before, torch.where(has_after, row + stride, row), has_after
