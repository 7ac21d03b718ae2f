"""dtd_pixel, TimeChat-Online's token drop on pixels: patches that differ enough from the step before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtok.methods import Gated, register
from vtok.methods.rlt import rlt


@register("dtd_pixel", kind="gate")
def dtd_pixel(frames: Tensor, patch: tuple[int, int], tubelet: int, threshold: float | None, state: Any) -> Gated:
    """Drop a patch whose mean absolute difference is below the threshold (strictly); the first step whole.

    ``rlt``'s distance; a patch right at the threshold is kept here and dropped there. The release works on RGB in
    [0, 1], units of 28 pixels (patch 14, merge_size 2) and steps of two frames (tubelet 2), and drops below 0.1. Its
    relative mode, which drops a share of each frame but the first, is a budget of ``relative_rows`` for each.

    Source: the pixel mode of TimeChat-Online's differential token drop.
    """
    gated = rlt(frames, patch, tubelet, threshold, state)
    return gated if threshold is None else gated._replace(keep=gated.score >= threshold)


def relative_rows(sites: int, share: float) -> int:
    """Rows that the relative mode keeps of each frame after the first, which it keeps whole."""
    return sites - int(sites * share)
