"""optimal: runs in time whose means lose the least of the video under one budget, and how far that is from the best."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.ops._rooms import ROOMS
from vtok.sites import runs

if TYPE_CHECKING:
    from vtok.decide import Goal, Plan

WORD = ROOMS["run_curve"].WORD  # frames of a word of run_curve's masks


@register("optimal", kind="merge")
def optimal(tokens: Tensor, layout: Layout, goal: Goal, *, exact: bool = False) -> Merged:
    """Cut each site's tokens into runs of consecutive frames; a run is one row, its mean, weighted by its length.

    Of all ways to cut a video into K runs this takes one whose squared error of ``unmerge()``, the tokens' summed
    squared distance to their run's mean (weighted by the call's ``weights``), is the least but for ``gap``. Each site's
    error for every number of runs comes from ``vtok.ops.run_curve``; along the lower hull of that curve each further
    run gains less, so the budget goes to the largest gains of all sites (ties to the lower site). All sites end on
    their hulls, where no other division is better, but at most the last one served.

    Args:
        exact: also search the numbers of runs that could still be better, those with a reduced cost of at most ``gap``,
            on the host in float64: the best division of the budget, and not within a graph, for it waits for the
            device.

    ``Packed.gap`` is what the result's error exceeds the Lagrangian dual by: no cutting of the same tokens into as many
    runs does better by more. It counts errors as ``run_curve`` computed them, in float32, and with ``exact`` it stays
    what it was: a bound, not the distance. Sites that are not finite have no part in it: they come last.

    A video needs a row for each site: a budget of less is a ValueError wherever the host knows (a graph over ragged
    videos drops whole sites). ``total_budget`` is one budget for the whole batch, and its videos share it as is best
    for their summed error. Positions are those of the run's first token. There is no threshold, no ``min_per_frame``
    and no budget per frame. Source: segmentation by dynamic programming, and Lagrangian allocation of a budget.
    """
    plan = expect_plan(layout, goal, exact)
    if layout.total == 0:
        none = layout.cu_seqlens[:0]
        return Merged(none, none, plan.cu_seqlens, gap=none.sum().double())
    frames = torch.sym_max(layout.longest, 1)
    curve, gain, opens = ops.run_curve(
        tokens, layout.cu_seqlens, layout.tokens_per_frame, frames, weights=goal.sizes, extra_rows=layout.extra_rows
    )
    slot, first, count = layout.columns()
    video = torch.zeros_like(slot) if plan.shared else layout.video_of(torch.arange(layout.total, device=slot.device))
    taken = largest_gains(gain, plan)
    before = torch.nn.functional.pad(taken.cumsum(0), (1, 0))
    k = before[first + count] - before[first]  # runs of each row's site
    cost = excess(curve, gain.masked_fill(taken, 0), slot, first, video)
    if exact:
        k = searched(cost, slot, first, video, k)
    gap = torch.where(slot - first + 1 == k, cost, 0).sum()
    index, counts = ops.compact(opening(opens, frames, slot, first, k), layout.cu_seqlens, plan.k)
    cu_seqlens = plan.cu_seqlens
    if plan.shared:
        cu_seqlens, goal.longest = torch.nn.functional.pad(counts.cumsum(0), (1, 0)), longest_share(layout, plan)
    return Merged(index, runs(index, layout), cu_seqlens, gap=gap)


def largest_gains(gain: Tensor, plan: Plan) -> Tensor:
    """bool [S], by entry of the curves: those that the budget takes."""
    segments, cu_k = plan.segments, plan.cu_k
    if plan.shared:
        segments, cu_k = segments[[0, -1]], cu_k[[0, -1]]
    taken = torch.zeros_like(gain, dtype=torch.bool)
    return taken.index_fill(0, ops.topk(gain, segments, cu_k, plan.k), True)


def excess(curve: Tensor, left: Tensor, slot: Tensor, first: Tensor, video: Tensor) -> Tensor:
    """float64 [S]: how far each entry, of the row in its place, is above what its site costs in the dual.

    The dual's price of a run is the largest gain ``left`` in its video: its cost is curve + price · runs.
    """
    left = left.double().nan_to_num(0, 0, 0)
    price = torch.zeros_like(left).scatter_reduce(0, video, left, "amax")
    cost = curve.double().nan_to_num(0)[slot] + price[video] * (slot - first + 1)
    lowest = torch.full_like(cost, torch.inf).scatter_reduce(0, first, cost, "amin")
    return cost - lowest[first]


def opening(opens: Tensor, frames: int, slot: Tensor, first: Tensor, k: Tensor) -> Tensor:
    """bool [S]: the rows that open a run where their site has k of them."""
    words, frame = (frames + WORD - 1) // WORD, slot - first
    word = opens[(first + k - 1).clamp(min=0) * words + frame // WORD]
    return (k > 0) & (word >> frame % WORD & 1 == 1)


def searched(cost: Tensor, slot: Tensor, first: Tensor, video: Tensor, k: Tensor) -> Tensor:
    """The runs of each row's site with the least summed excess of all that add up to as many. Waits for the device."""
    order = slot.argsort().cpu()
    cost, site, video, best = (x.cpu()[order] for x in (cost, first, video, k))
    runs_of = torch.arange(len(order)) - site + 1
    gap = torch.zeros_like(cost).index_add(0, video, torch.where(runs_of == best, cost, 0))
    for v in gap.nonzero()[:, 0].tolist():
        within = ((video == v) & (cost <= gap[v] * (1 + 2**-40))).nonzero()[:, 0]
        rows = zip(site[within].tolist(), runs_of[within].tolist(), cost[within].tolist(), strict=True)
        choices = {s: [(n, c) for _, n, c in rows] for s, rows in groupby(rows, lambda row: row[0])}
        total = sum(int(best[s]) for s in choices)
        for s, n in zip(choices, least_sum(list(choices.values()), total), strict=True):
            best[s : s + int((site[s:] == s).sum())] = n
    return torch.empty_like(best).scatter(0, order, best).to(k.device)


def least_sum(choices: list[list[tuple[int, float]]], total: int) -> list[int]:
    """One (number, cost) of each list, numbers ascending, so that the numbers add up to total and cost the least."""
    spare = total - sum(options[0][0] for options in choices)  # beyond the smallest numbers
    least, steps = torch.full((spare + 1,), torch.inf, dtype=torch.float64), []
    least[0] = 0
    for options in choices:
        best, step = torch.full_like(least, torch.inf), torch.zeros(spare + 1, dtype=torch.int64)
        for more, cost in ((number - options[0][0], cost) for number, cost in options):
            if more <= spare:
                sums = torch.nn.functional.pad(least[: spare + 1 - more] + cost, (more, 0), value=torch.inf)
                step, best = torch.where(sums < best, more, step), torch.minimum(sums, best)
        least = best
        steps.append(step)
    numbers = []
    for options, step in zip(reversed(choices), reversed(steps), strict=True):
        more = int(step[spare])
        numbers.append(options[0][0] + more)
        spare -= more
    return numbers[::-1]


def longest_share(layout: Layout, plan: Plan) -> int:
    """Rows of one video at most, where the batch shares its budget."""
    if layout.grid_of_each is not None:
        t, h, w = layout.grid_of_each
        return torch.sym_min(t * h * w, plan.k)
    return torch.sym_min(torch.ops.vtok.host_max(layout.rows_on_host) + layout.extra_rows, plan.k)


def expect_plan(layout: Layout, goal: Goal, exact: bool) -> Plan:
    """The goal's plan; ValueError for one that cannot be met, or not so."""
    if goal.plan is None:
        raise ValueError("method 'optimal': expected a budget, got a threshold")
    plan, each = goal.plan, 1 + bool(layout.extra_rows)
    if plan.floor is not None:
        raise ValueError("method 'optimal': expected min_per_frame=0, got rows that each frame keeps")
    if plan.segments.shape[0] != layout.videos * each + 1:
        raise ValueError("method 'optimal': expected a budget of each video or of all, got one of each frame")
    compiling = torch.compiler.is_compiling()
    if exact and (compiling or (layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing())):
        raise ValueError("method 'optimal': expected exact=False inside a graph: the search waits for the device")
    if plan.on_host is None and layout.grid_of_each is not None:
        _, h, w = layout.grid_of_each
        rows, sites = (plan.k, layout.videos * h * w) if plan.shared else (plan.longest, h * w)
        pairs = [(rows, sites)] if layout.total else []
    elif plan.on_host is None or compiling:
        return plan
    else:
        sites_of = [h * w if t else 0 for t, h, w in layout.grids]
        pairs = list(zip((quota for _, quota in plan.on_host[::each]), sites_of, strict=True))
        if plan.shared:
            pairs = [(sum(rows for rows, _ in pairs), sum(sites_of))]
    for rows, sites in pairs:
        if rows < sites:
            raise ValueError(f"method 'optimal': expected a row for each of the {sites} sites, got a budget of {rows}")
    return plan
