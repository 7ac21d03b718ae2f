"""uniform: whole frames, evenly spread over time. A baseline that never looks at the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok.layout import Layout
from vtok.methods import register

if TYPE_CHECKING:
    from vtok.decide import Plan


@register("uniform")
def uniform(tokens: Tensor, layout: Layout, plan: Plan | None) -> Tensor:
    """2 in the frames kept whole, 1 in the one kept in part, 0 elsewhere: float32 [S].

    A budget of k rows in a video of T frames of n sites pays for f = k // n whole frames and r = k % n rows more.
    With g = f + (r > 0) the frames are those at ``i·T // g`` for i = 0 .. g-1, so the first is always among them; the
    last of them is the partial one and keeps its first r rows in raster order. Integer arithmetic throughout.
    """
    if plan is None:
        raise ValueError("method 'uniform': expected a budget, got a threshold")
    row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    if layout.videos == 0:
        return row.to(torch.float32)
    video, sites = layout.video_of(row), layout.tokens_per_frame.clamp(min=1)
    length = layout.cu_frames.diff().clamp(min=1)[video]
    rows = plan.rows
    whole = (rows // sites)[video]
    some = ((rows + sites - 1) // sites).clamp(min=1)[video]
    frame = (row - layout.cu_seqlens[video]) // sites[video]
    i = (frame * some + length - 1) // length  # the only one whose frame this can be
    chosen = (i * length // some == frame) & (i < some)
    return chosen * torch.where(i < whole, 2.0, 1.0)
