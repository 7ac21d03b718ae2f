"""holitom: the windows that save most by merging what stays the same in them, then the tokens most looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.sites import steps_since
from vtok.units import Units, expect_budget, frames_of_rows, merge_units, salience_of, share_of, without_frames
from vtok.windows import static_windows, window_ends

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("holitom", kind="merge")
def holitom(
    tokens: Tensor,
    layout: Layout,
    goal: Goal,
    *,
    attention: Tensor | None = None,
    similarity: float = 0.8,
    most: int = 1024,
    contextual: float = 0.0,
    blend: float = 0.6,
    neighbours: int = 7,
) -> Merged:
    """Split each video into the windows in which the most tokens can be merged over time, and thin out what is left.

    A site is static in a window where its cosine from each frame to the next is above ``similarity`` (strictly); a
    dynamic programme finds the windows (``vtok.windows.static_windows``). A window's static tokens, temporal means, and
    a frame's dynamic ones are a group each. All groups keep the same share, so that exactly the budget is kept. Of a
    static group those are the centres of DPC-KNN, which the others join. Of a dynamic group they are the tokens that
    draw the most attention, and for the share ``contextual`` centres that the others join; where there is no such share
    the others are dropped, as in the release. Under a larger budget than there are such tokens those of static sites
    follow.

    Args:
        attention: [S], the attention that each token draws in the encoder. Without it a token draws some that is unlike
            the mean of its frame.
        most: frames of the longest window, at least 1.
        contextual: of a frame's dynamic tokens that are kept, the share that are centres; rounded half to even. A float
            is the decimal that it prints as. (The release stops with an error at a share above 0.)
        blend: the share of a centre in its row, below 1; the others have the rest, in equal parts. At 0 the row is the
            mean of all, which the release has a switch for.
        neighbours: how many the density looks at, the token itself among them, in [1, 64].

    Departs from the release in this: the budget is what is kept, not each group's share rounded up, densities get no
    noise and look at as many neighbours where a group has fewer centres, and rows come out by position, the static ones
    in the first frame of their window. Its merging inside the language model is not vtok's.

    Source: the released code of HoliTom. It has no threshold. Copies the tokens, without ``attention`` several times as
    float32.
    """
    plan, share = expect_budget("holitom", goal), share_of("holitom", "contextual", contextual)
    if most < 1 or not 0 <= blend < 1:
        raise ValueError(f"method 'holitom': expected most >= 1 and blend in [0, 1), got {most} and {blend}")
    if layout.frames == 0:
        return without_frames(goal)
    alike = ops.temporal_similarity(tokens, layout.cu_seqlens, layout.tokens_per_frame)
    steps = steps_since(~(alike > similarity) | layout.extra_mask(), layout)
    windows = static_windows(steps, layout, most=most)
    units = Units.of(_static(steps, windows, layout), windows, layout)
    salience = salience_of("holitom", attention, tokens, layout)
    return merge_units(
        tokens, goal, units, units.quotas(plan), salience, contextual=share, neighbours=neighbours, blend=blend
    )


def _static(steps: Tensor, windows: Tensor, layout: Layout) -> Tensor:
    """bool [S]: rows whose site has been the same, in the last frame of their window, since its first."""
    row = torch.arange(layout.total, dtype=torch.int64, device=steps.device)
    frame, last = frames_of_rows(layout)[0], window_ends(windows) - 1
    at_end = row + (last[frame] - frame) * layout.tokens_per_frame[layout.video_of(row)]
    length = (last - windows)[frame]
    return (length > 0) & (steps[at_end.clamp(max=layout.total - 1)] >= length)
