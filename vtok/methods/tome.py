"""tome: tokens join the one they are most alike, anywhere in the video, until the budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.units import at

if TYPE_CHECKING:
    from vtok.decide import Goal, Plan

LARGEST = torch.finfo(torch.float32).max


@register("tome", kind="merge")
def tome(
    tokens: Tensor,
    layout: Layout,
    goal: Goal,
    *,
    protected: int = 0,
    metric: Tensor | None = None,
    per: str = "video",
    split: int = 2,
    order: str = "place",
) -> Merged:
    """Merge the pairs of tokens that are most alike: exactly as many as the budget asks for.

    In a round the even tokens of a segment look among its odd ones, and the r whose best cosine is largest join what
    they found (ties to the lower token, NaN last); several may join one. A round can halve a segment; where more has to
    go, further rounds follow on the merged tokens, compared by the float32 means of what has joined them,
    weighted by the call's ``weights``.

    Args:
        protected: the first tokens of each segment, which never merge (a class token).
        metric: [S, C], what is compared instead of the tokens, such as the mean of the attention keys over the heads.
        per: "video", or "frame" where every frame merges within itself: its share of the budget follows from its
            place, ⌊K·(t+1)/T⌋ - ⌊K·t/T⌋. A nested budget, one number per frame, is per frame by itself.
        split: every so many tokens of a segment one that others join: with k > 2 the release's kth_bipartite, whose
            single round leaves every k-th token. It drops the tokens after the last whole k; here they merge too.
        order: "place", or "release": further rounds pair the tokens as the release does, which scatters them (sources
            that found nobody by descending cosine, in order where tokens are protected, then destinations), and
            ``Packed.order`` tells its order.

    A row is the mean of all tokens that joined it, ``weight`` their number (ToMe's size). It stands at the last token
    that the others joined, and rows come out by that token. By place a second round pairs other tokens than the release
    where its first left sources over, which halving an even number of tokens never does.

    Source: the bipartite soft matching of ToMe. It has no threshold and no ``min_per_frame``. Inside a graph the number
    of rounds has to be known: dense tokens with one budget for all videos, or a Plan made outside of it (and then per
    video).
    """
    if per not in ("video", "frame"):
        raise ValueError(f"method 'tome': expected per 'video' or 'frame', got {per!r}")
    pairing, clip = Pairing(protected, split, scattered("tome", order)), 1 if per == "frame" else None
    return join("tome", tokens if metric is None else metric, layout, goal, pairing, clip)


@dataclass(frozen=True)
class Pairing:
    """Which rows of a segment may leave it in a round."""

    protected: int = 0
    split: int = 2
    scatters: bool = False  # as the release does

    def most(self, rows: Any) -> Any:
        """How many of a segment's rows at most; a tensor of lengths works too. Of an odd row too many one stays."""
        free = (rows - self.protected) * (rows > self.protected)
        receive = (rows // self.split - self.protected // self.split) * (free > 0)
        return free // 2 if self.split == 2 else (free - receive) * (receive > 0)

    def order(self, kept: Tensor, best: Tensor, bounds: Tensor, left: Tensor) -> Tensor:
        """int64 [K]: ``kept`` rows in the release's order, of each segment its sources, then its destinations.

        A segment that all its rows are ``left`` of, int64 [G], has no round.
        """
        segment = torch.searchsorted(bounds[1:].contiguous(), kept, right=True)
        still = (bounds.diff() == left)[segment]
        receives = ((kept - bounds[segment]) % self.split == self.split - 1) & ~still
        ranked = torch.where(receives | still | (self.protected > 0), 0, best[kept].nan_to_num(-LARGEST))
        likely = ranked.argsort(descending=True, stable=True)
        return kept[likely[(2 * segment + receives)[likely].argsort(stable=True)]]


def scattered(name: str, order: str) -> bool:
    """Whether rows are to be in the release's order."""
    if order not in ("place", "release"):
        raise ValueError(f"method {name!r}: expected order 'place' or 'release', got {order!r}")
    return order == "release"


def join(name: str, metric: Tensor, layout: Layout, goal: Goal, pairing: Pairing, clip: int | None) -> Merged:
    """The rounds that bring each segment of the plan, or each clip of some frames, down to its quota."""
    if goal.plan is None:
        raise ValueError(f"method {name!r}: expected a budget, got a threshold")
    if goal.plan.floor is not None:
        raise ValueError(f"method {name!r}: expected min_per_frame=0, got rows that each frame keeps")
    if metric.dim() != 2 or metric.shape[0] != layout.total:
        raise ValueError(f"method {name!r}: expected metric [{layout.total}, C], got {tuple(metric.shape)}")
    bounds, quotas = goal.plan.segments, goal.plan.cu_k.diff()
    pairs, times = on_host(name, layout, goal.plan)
    if clip is not None and bounds.shape[0] == layout.videos * (1 + bool(layout.extra_rows)) + 1:  # no nested budget
        (bounds, quotas), pairs = clips(layout, goal.plan, clip), clips_on_host(layout, pairs, clip)
    totals = [times * rows for rows in rounds(name, pairs, pairing)]
    x, weight = metric.float() if len(totals) > 1 else metric, goal.sizes
    index = torch.arange(layout.total, dtype=torch.int64, device=metric.device)
    assignment = index
    for total in totals:
        kept, joined, left = one_round(x, bounds, quotas, total, pairing)
        index, assignment = index[kept], at(joined, assignment)
        bounds = torch.nn.functional.pad(left.cumsum(0), (1, 0))
        if total != totals[-1]:
            x, weight = ops.merge(x, *ops.group(joined, total), weight)
    if not pairing.scatters:
        return Merged(index, assignment, goal.plan.cu_seqlens)
    place = index.argsort()
    order = torch.empty_like(place).scatter(0, place, torch.arange(place.shape[0], device=place.device))
    return Merged(index[place], at(order, assignment), goal.plan.cu_seqlens, order=order)


def one_round(x: Tensor, bounds: Tensor, quotas: Tensor, total: int, pairing: Pairing) -> tuple[Tensor, Tensor, Tensor]:
    """(int64 [total] the rows that stay, int64 [S] which of them each row joins or -1, int64 [G] rows left of each)."""
    rows = bounds.diff()
    left = torch.maximum(quotas, rows - pairing.most(rows)).where(quotas > 0, 0)
    leaving = bounds - torch.nn.functional.pad(left.cumsum(0), (1, 0))
    best, target = ops.bipartite_match(x, bounds, split=pairing.split, protected=pairing.protected)
    row = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
    score = torch.where(target == row, -torch.inf, best.nan_to_num(-LARGEST, LARGEST, -LARGEST))
    gone = ops.topk(score, bounds, leaving, x.shape[0] - total)
    stays = torch.ones_like(row, dtype=torch.bool).index_fill(0, gone, False)
    kept, _ = ops.compact(stays, bounds, total)
    slot = torch.where(stays, stays.cumsum(0) - 1, -1)
    if pairing.scatters:
        kept = pairing.order(kept, best, bounds, left)
        slot = slot.scatter(0, kept, torch.arange(total, dtype=torch.int64, device=x.device))
    return kept, at(slot, torch.where(stays, row, target)), left


def rounds(name: str, pairs: list[tuple[int, int]], pairing: Pairing) -> list[int]:
    """Rows of all segments together after each round; a round takes no more of a segment than may leave."""
    totals = []
    while any(rows > quota for rows, quota in pairs):
        for rows, quota in pairs:
            if rows > quota > 0 and pairing.most(rows) == 0:
                raise ValueError(f"method {name!r}: expected a budget of at least {rows} rows a segment, got {quota}")
        pairs = [(max(quota, rows - pairing.most(rows)) if quota else 0, quota) for rows, quota in pairs]
        totals.append(sum(rows for rows, _ in pairs))
    return totals


def on_host(name: str, layout: Layout, plan: Plan) -> tuple[list[tuple[int, int]], int]:
    """Rows and quota of each segment of the plan, and how often they come: a graph knows one video and a number."""
    if plan.on_host is not None:
        return plan.on_host, 1
    if layout.grid_of_each is None or plan.k != layout.videos * plan.longest:
        raise ValueError(f"method {name!r}: expected a Plan made outside of the graph for videos that are not alike")
    t, h, w = layout.grid_of_each
    return [(t * h * w, plan.longest)], layout.videos


def clips(layout: Layout, plan: Plan, clip: int) -> tuple[Tensor, Tensor]:
    """(int64 [G+1] where clips of some frames start, and rows after the grids, int64 [G] the quota of each)."""
    first, sites = layout.frame_starts()
    frame = torch.arange(layout.frames, dtype=torch.int64, device=layout.device)
    video = torch.searchsorted(layout.cu_frames, frame, right=True) - 1
    t, frames, kept = frame - layout.cu_frames[video], layout.cu_frames.diff()[video], plan.rows[video]
    opens, end = t % clip == 0, torch.minimum(t - t % clip + clip, frames)
    quotas = torch.where(opens, kept * end // frames.clamp(min=1) - kept * t // frames.clamp(min=1), 0)
    # The clip's other frames make empty segments at its end.
    starts = torch.where(opens, first, layout.cu_seqlens[video] + end * sites)
    if layout.extra_rows:
        starts, order = torch.cat([starts, layout.cu_seqlens[1:] - layout.extra_rows]).sort(stable=True)
        quotas = torch.cat([quotas, torch.full_like(layout.tokens_per_frame, layout.extra_rows)])[order]
    return torch.cat([starts, layout.cu_seqlens[-1:]]), quotas


def clips_on_host(layout: Layout, pairs: list[tuple[int, int]], clip: int) -> list[tuple[int, int]]:
    """The same sizes and quotas from those of whole videos; rows after the grids, all kept, are counted alone."""
    each = 1 + bool(layout.extra_rows)
    alike = layout.grid_of_each
    lengths = [alike[0]] * (len(pairs) // each) if alike is not None else [t for t, _, _ in layout.grids]
    made = list(pairs[1::2]) if layout.extra_rows else []
    for frames, (rows, quota) in zip(lengths, pairs[::each], strict=True):
        for a in range(0, frames, clip):
            b = min(a + clip, frames)
            made.append((rows // frames * (b - a), quota * b // frames - quota * a // frames))
    return made
