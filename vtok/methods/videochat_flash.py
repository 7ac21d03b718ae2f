"""videochat_flash: within clips of a few frames tokens join the one they are most alike, until the budget is met."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.methods.tome import Pairing, join, scattered

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("videochat_flash", kind="merge")
def videochat_flash(
    tokens: Tensor, layout: Layout, goal: Goal, *, clip: int = 4, head_dim: int = 64, order: str = "place"
) -> Merged:
    """``tome`` within clips of some frames, compared by the mean of the tokens' heads.

    Args:
        clip: frames of a clip; the last one of a video may be shorter. A clip that starts at frame a and ends before b
            keeps ⌊K·b/T⌋ - ⌊K·a/T⌋ of the K rows of its video of T frames.
        head_dim: channels of a head; the number of channels is a multiple of it.
        order: "place", or "release" for ``Packed.order``, as of ``tome``.

    The release keeps 16 tokens of each frame (a budget of 16·T rows), clips of 4 frames, heads of 64 channels; ``tome``
    says where its order differs.

    Source: the projector of VideoChat-Flash.
    """
    if clip < 1 or head_dim < 1 or tokens.shape[1] % head_dim:
        got = f"clip {clip} and head_dim {head_dim}"
        raise ValueError(f"method 'videochat_flash': expected tokens of whole heads in clips, got {got}")
    heads = tokens.unflatten(1, (-1, head_dim))
    return join(
        "videochat_flash",
        heads.mean(1, dtype=torch.float32),
        layout,
        goal,
        Pairing(scatters=scattered("videochat_flash", order)),
        clip,
    )
