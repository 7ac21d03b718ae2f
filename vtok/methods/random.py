"""random: rows drawn evenly. A baseline that never looks at the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok.layout import Layout
from vtok.methods import register

if TYPE_CHECKING:
    from vtok.decide import Plan

LOW_31 = 2**31 - 1


@register("random")
def random(tokens: Tensor, layout: Layout, plan: Plan | None, *, seed: int = 0) -> Tensor:
    """float32 [S] in [0, 1), a hash of the seed and the row's number within its video.

    Integer arithmetic alone: the same on every device, inside a graph and in any batch. Videos of one batch draw the
    same numbers; for other noise pass it as ``scores``.
    """
    row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    if layout.videos:
        row = row - layout.cu_seqlens[layout.video_of(row)]
    mixed = _mix((row & LOW_31) ^ _mix(row >> 31) ^ _mix(torch.full_like(row, seed & LOW_31)))
    return (mixed >> 7).to(torch.float32) / 2**24


def _mix(x: Tensor) -> Tensor:
    """A bijection of 31-bit integers that spreads every bit; its products stay below 2**63."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (17, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * factor) & LOW_31
    return x ^ (x >> 15)
