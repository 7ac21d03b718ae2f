"""dycoke: windows of four frames, the first whole, the others cut to what differs from it or from their neighbour."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import register

if TYPE_CHECKING:
    from vtok.decide import Plan

WINDOW = 4


def rows_of_each_frame(grid: tuple[int, int, int], *, drop: float = 0.7, compat: str | None = None) -> list[int]:
    """Whole frames and cut ones, which lose the share ``drop`` of their rows: the method's own budget.

    A share is the decimal that it prints as; the release computes ``int((1 - drop) * n)`` in doubles.
    """
    frames, sites = grid[0], grid[1] * grid[2]
    if not 0 <= drop <= 1:
        raise ValueError(f"method 'dycoke': expected drop as a share in [0, 1], got {drop}")
    some = int((1 - (drop if compat else Fraction(str(drop)))) * sites)
    last = frames - 1 if frames % 2 else frames  # the frame without a partner
    if compat is None:
        return [sites if t % WINDOW == 0 or t == last else some for t in range(frames)]
    whole = [t % WINDOW == 0 or (t % WINDOW == 2 and t - 2 >= frames - WINDOW) for t in range(frames)]
    return [0 if t == last else sites if whole[t] else some for t in range(frames)]


@register("dycoke", budget=rows_of_each_frame)
def dycoke(
    tokens: Tensor, layout: Layout, plan: Plan | None, *, drop: float = 0.7, compat: str | None = None
) -> Tensor:
    """1 - cosine, of frames 1 and 3 of a window to the frame before, of frame 2 to frame 0; +inf in frame 0.

    Without a budget of the caller the first frame of each window of four and the odd last frame are kept whole, and of
    every other one all but the share ``drop``.

    Args:
        drop: the share that a cut frame loses: 0.7 in the release's evaluation, 0.3 in its loader.
        compat: "dycoke" for the counts of the release: the odd last frame is lost, the last window keeps its third
            frame whole too, and shares are computed in doubles. (It needs five frames, and returns the rows of a cut
            frame by similarity; here they come by position.)

    Reads the tokens twice. Source: the token merging of DyCoke, which merges nothing. Returns float32 [S].
    """
    if compat not in (None, "dycoke"):
        raise ValueError(f"method 'dycoke': expected compat None or 'dycoke', got {compat!r}")
    row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    if layout.videos == 0:
        return row.to(torch.float32)
    video = layout.video_of(row)
    t = (row - layout.cu_seqlens[video]) // layout.tokens_per_frame[video].clamp(min=1)
    sites = layout.tokens_per_frame
    before, two_before = (ops.temporal_similarity(tokens, layout.cu_seqlens, n) for n in (sites, 2 * sites))
    score = 1 - torch.where(t % WINDOW == 2, two_before, before).to(torch.float32)
    whole = t % WINDOW == 0
    if compat:
        frames = layout.cu_frames.diff()[video]
        whole = whole | ((t % WINDOW == 2) & (t - 2 >= frames - WINDOW))
        lost = (t == frames - 1) & (frames % 2 == 1)
        return score.masked_fill(whole, torch.inf).masked_fill(lost, -torch.inf)
    return score.masked_fill(whole, torch.inf)
