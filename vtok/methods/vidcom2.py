"""vidcom2: tokens unlike their video and unlike their frame, more of them in unusual frames."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import register

if TYPE_CHECKING:
    from vtok.decide import Plan

BANDWIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
TEMPERATURE = 0.01
FAR = 16  # redundancy lies in [0.7, 10]: times this it is above all that is not, and no bit of it is lost


@register("vidcom2")
def vidcom2(tokens: Tensor, layout: Layout, plan: Plan | None, *, share: float | None = None) -> Tensor:
    """Minus the redundancy of each row; of those beyond their frame's own count, FAR times that, so that they go first.

    Of a video's channels the half that varies least is looked at, each row at unit length. Redundancy is how close a
    row comes to the mean of its video plus how close to that of its frame, a sum of five Gaussians each. A frame whose
    rows are far from the video's mean on average may keep more of its rows: k[t] of them, which add up to about the
    budget. What is over it is dropped, what is missing added, by redundancy, frames notwithstanding.

    Args:
        share: what k[t] is a share of, for all videos; the budget's share of each video if left out.

    The budget is met exactly, as in vLLM; ``vllm_rows`` counts what that keeps, whose k[t] then are of ``share=1 - q``.
    The authors' own release keeps the k[t] rows as they are, see ``reference_mask``. Departs from both in this: k[t] is
    counted on the device, ties go to the lower row, and a row that is not finite takes part in no mean and comes last.

    Source: the released code of VidCom2 and vLLM 0.33's port of it. Returns float32 [S]. Copies the tokens as float32
    several times.
    """
    if plan is None:
        raise ValueError(
            "method 'vidcom2': expected a budget, got a threshold: see vtok.methods.vidcom2.reference_mask"
        )
    if layout.frames == 0:
        return torch.zeros(layout.total, device=layout.device)
    shares = plan.rows.float() / layout.grid_rows.clamp(min=1).float() if share is None else share
    redundancy, within = frame_by_frame(tokens, layout, shares)
    return torch.where(within, -redundancy, -FAR * redundancy)


def reference_mask(tokens: Tensor, layout: Layout, share: float) -> Tensor:
    """bool [S]: the k[t] least redundant rows of each frame, as the authors' release keeps them.

    How many there are only the device knows, about ``share`` of all; for ``vtok.compress`` they are
    ``scores=mask.float(), threshold=0.5``. ``tokens`` are packed rows [S, D]. Never syncs.
    """
    if layout.frames == 0:
        return torch.zeros(layout.total, dtype=torch.bool, device=layout.device)
    return frame_by_frame(tokens, layout, share)[1]


def vllm_rows(frames: int, sites: int, q: float) -> int:
    """Rows that vLLM keeps of a video at the pruning rate ``q``, in its binary arithmetic: one per frame at least."""
    return max(frames, min(int(frames * sites * (1 - q)), frames * sites))


def frame_by_frame(tokens: Tensor, layout: Layout, share: Tensor | float) -> tuple[Tensor, Tensor]:
    """(float32 [S] redundancy, NaN outside frames; bool [S], the k[t] least redundant rows of each frame)."""
    x, row = tokens.to(torch.float32), torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    frame, video = layout.frame_of(row), layout.video_of(row)
    means = _Means(layout, torch.where(x.isfinite().all(-1) & (frame < layout.frames), frame, -1))
    frame = frame.clamp(max=layout.frames - 1)

    channels = _steady(means.of_videos((x - means.of_videos(x)[1][video]).square())[1])
    f = torch.nn.functional.normalize(torch.where(channels[video], x, 0), dim=-1)
    of_frame, of_video = means.of_videos(f)
    to_video = _closeness(f, of_video[video])
    redundancy = torch.where(means.frame >= 0, to_video + _closeness(f, of_frame[frame]), torch.nan)

    first, sites = layout.frame_starts()
    each = share[means.video] if isinstance(share, Tensor) else share
    wanted = each * (1 + means.unusual(to_video))
    k = (wanted.clamp(max=1) * sites).round().to(torch.int64).clamp(min=1).minimum(sites)
    zero = layout.cu_seqlens[:1]
    bounds = torch.cat([zero, first[1:], layout.cu_seqlens[-1:]])
    best = ops.topk(redundancy, bounds, torch.cat([zero, k.cumsum(0)]), layout.total, largest=False)
    spare = torch.zeros(layout.total + 1, dtype=torch.bool, device=layout.device)
    return redundancy, spare.index_fill(0, torch.where(best < 0, layout.total, best), True)[:-1]


class _Means:
    """Means over the rows of each frame and over those of each video, in a fixed order."""

    def __init__(self, layout: Layout, frame: Tensor) -> None:
        """``frame`` int64 [S], which frame each row counts in, -1 for none."""
        number = torch.arange(layout.frames, dtype=torch.int64, device=layout.device)
        self.frame, self.video = frame, torch.searchsorted(layout.cu_frames, number, right=True) - 1
        self.rows_of = ops.group(frame, layout.frames)
        self.frames_of = ops.group(self.video, layout.videos)

    def of_videos(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [F, C] and [V, C] of ``x`` [S, C]."""
        of_frame, rows = ops.merge(x, *self.rows_of)
        return of_frame, ops.merge(of_frame, *self.frames_of, rows)[0]

    def unusual(self, closeness: Tensor) -> Tensor:
        """float32 [F]: the softmax within each video of how far its frames are from its mean, less its own mean."""
        near, rows = ops.merge(closeness[:, None], *self.rows_of)
        far = torch.where(rows[:, None] > 0, -near, -torch.inf)  # a frame without a row to judge by is usual
        most, _ = ops.merge(far, *self.frames_of, reduce="max")
        power = ((far - most[self.video]) / TEMPERATURE).exp().nan_to_num(0)
        total, _ = ops.merge(power, *self.frames_of, reduce="sum")
        p = power / total[self.video].clamp(min=1)  # the largest power is 1
        return (p - ops.merge(p, *self.frames_of)[0][self.video])[:, 0]


def _steady(variance: Tensor) -> Tensor:
    """bool [V, D]: the channels that vary least, half of them."""
    videos, channels = variance.shape
    some = torch.sym_max(1, channels // 2)
    start = torch.arange(videos + 1, dtype=torch.int64, device=variance.device)
    least = ops.topk(variance.flatten(), start * channels, start * some, videos * some, largest=False)
    return torch.zeros_like(variance, dtype=torch.bool).flatten().index_fill(0, least, True).view_as(variance)


def _closeness(f: Tensor, centre: Tensor) -> Tensor:
    """float32 [S]: a sum of Gaussians of the distance between rows."""
    square = (f - centre).square().sum(-1)
    return reduce(torch.add, [torch.exp(square * (-1 / (2 * a))) for a in BANDWIDTHS])
