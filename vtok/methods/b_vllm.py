"""b_vllm, B-VLLM's temporal merge: frames chosen by the same text for the same reason become their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.sites import slots_of

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("b_vllm", kind="merge")
def b_vllm(
    tokens: Tensor, layout: Layout, goal: Goal, *, distributions: Tensor | None = None, hops: str = "full"
) -> Merged:
    """Join each frame, token by token, with the earlier frame of its video whose distribution is most like its own.

    It joins where (cosine + 1) / 2 of the two distributions is above the threshold (strictly); the release's is 0.75.
    Of equals the earliest frame counts.

    Args:
        distributions: floats [F, M], what each frame of the batch was mixed from (which frames of the video its query
            chose, and how much of each).
        hops: "full" follows the links to their end, so that every frame is in the mean of the earliest that it leads
            to; or "one", the release's rule, by which what joined a frame that itself joined another is lost.

    Frames with a NaN in their distribution stay by themselves. A merge has no budget of rows: frames stay or join.

    Source: the temporal merge of the released B-VLLM. Its spatial merge never runs with the released settings.
    """
    if goal.plan is not None:
        raise ValueError("method 'b_vllm': expected a threshold, got a budget")
    if hops not in ("full", "one"):
        raise ValueError(f"method 'b_vllm': expected hops 'full' or 'one', got {hops!r}")
    if distributions is None or distributions.dim() != 2 or distributions.shape[0] != layout.frames:
        got = "none" if distributions is None else tuple(distributions.shape)
        raise ValueError(f"method 'b_vllm': expected distributions of shape [{layout.frames}, M], got {got}")
    row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    if layout.frames == 0:  # rows after the grids at most
        index, cu_seqlens, counts = goal.choose(torch.zeros_like(row, dtype=torch.float32), row >= 0)
        return Merged(index, slots_of(index, layout), cu_seqlens, counts)
    into, likeness = _links(distributions.detach(), layout, goal.threshold)
    frame = torch.arange(layout.frames, dtype=torch.int64, device=row.device)
    stays = into == frame
    if hops == "full":
        into = ops.connected_components(frame, into, layout.frames)
    frame = layout.frame_of(row)
    inside, frame = frame < layout.frames, frame.clamp(max=layout.frames - 1)
    score = torch.where(inside, 1 - likeness[frame], torch.inf)
    index, cu_seqlens, counts = goal.choose(score, stays[frame] | ~inside)
    sites = layout.tokens_per_frame[layout.video_of(row)]
    target = torch.where(inside, row - (frame - into[frame]) * sites, row)
    slot = slots_of(index, layout)
    return Merged(index, torch.where(slot >= 0, slot, slot[target]), cu_seqlens, counts, score)


def _links(distributions: Tensor, layout: Layout, threshold: float) -> tuple[Tensor, Tensor]:
    """(int64 [F] the frame that each joins, itself if none; float32 [F] how alike the best earlier one is, or -inf)."""
    frame = torch.arange(layout.frames, dtype=torch.int64, device=distributions.device)
    video = torch.searchsorted(layout.cu_frames, frame, right=True)
    unit = torch.nn.functional.normalize(distributions.double(), dim=-1)  # rounded below: no order of sums shows
    alike = ((unit @ unit.T + 1) / 2).float().nan_to_num(-torch.inf)
    earlier = (video[:, None] == video) & (frame < frame[:, None])
    alike = alike.masked_fill(~earlier, -torch.inf)
    best = alike.amax(1)
    first = torch.where(alike == best[:, None], frame, layout.frames).amin(1)
    return torch.where(best > threshold, first, frame), best
