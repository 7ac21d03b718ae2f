"""Static and dynamic tokens: what stays the same through a window is one unit, and a budget is split among units.

A unit is a token, or all tokens of a site through a window in which that site stays the same; it stands at the first of
them, its head. On the device alone, without a sync.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtok import ops
from vtok.layout import Layout, constant_in_graph
from vtok.methods import Merged
from vtok.packed import as_weights, sum_members
from vtok.sites import slots_of
from vtok.windows import frame_means

if TYPE_CHECKING:
    from vtok.decide import Goal, Plan

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Units:
    """Which rows are units; rows after the grids are none. For at least one frame."""

    layout: Layout
    head: Tensor  # int64 [S], the row that each row's unit stands at
    static: Tensor  # bool [S], heads of units of several tokens
    dynamic: Tensor  # bool [S], units of one token

    @staticmethod
    def of(still: Tensor, windows: Tensor, layout: Layout) -> Units:
        """``still`` bool [S]: rows whose site stays the same through their window; ``windows`` int64 [F]."""
        row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
        _, inside = frames_of_rows(layout)
        still, begin = still & inside, head_rows(windows, layout)
        head = torch.where(still, begin, row)
        return Units(layout, head, still & (head == row), ~still & inside)

    def sizes(self) -> tuple[Tensor, Tensor]:
        """(int64 [F] static, int64 [F] dynamic units of each frame)."""
        before = pad(torch.stack([self.static, self.dynamic]).cumsum(1), (1, 0))
        static, dynamic = before[:, frame_bounds(self.layout)].diff()
        return static, dynamic

    def quotas(self, plan: Plan, taken: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(int64 [F] static, int64 [F] dynamic units of each frame to keep): in proportion to how many there are.

        The units of each segment of the plan are counted through, a frame's static ones before its dynamic ones. Of the
        budget, less the rows ``taken`` bool [S] that are no units, a part gets the share up to its end less the share
        up to its beginning, both rounded down.
        """
        before = pad((self.static | self.dynamic).cumsum(0), (1, 0))
        here = plan_segments(self.layout, plan)
        begin = before[plan.segments[here]]
        units = before[plan.segments[here + 1]] - begin
        budget = plan.cu_k.diff() if taken is None else plan.cu_k.diff() - slots(taken)[plan.segments].diff()
        kept = torch.minimum(budget[here], units)
        static, dynamic = self.sizes()
        ends = torch.stack([before[frame_bounds(self.layout)[:-1]] - begin, static, dynamic]).cumsum(0)
        k_static, k_dynamic = (kept * ends // units.clamp(min=1)).diff(dim=0)
        return k_static, k_dynamic


def merge_units(
    tokens: Tensor,
    goal: Goal,
    units: Units,
    quotas: tuple[Tensor, Tensor],
    salience: Tensor,
    *,
    contextual: tuple[int, int] = (1, 1),
    neighbours: int = 7,
    blend: float = 0.0,
    unit_values: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Merged:
    """Keep so many static and so many dynamic units of each frame; others join one that is kept, or go.

    Static units, each the mean of its tokens, cluster among those of their frame (DPC-KNN). So do of the dynamic ones
    as many as the share ``contextual`` says; the others that are kept are those of the largest ``salience`` [S], which
    stand alone. A unit that neither is nor has a centre is dropped. Where the quotas do not fill the budget more units
    follow, alone, and then tokens of static units, by salience.

    ``quotas`` are int64 [F] each, no more than there are; ``blend`` is the share of a centre in its row, below 1, or 0
    for the mean of all. A unit is the mean of its tokens and a row that of all its tokens; with ``unit_values`` a unit
    is what that makes of the rows [S, D] and the row each stands at int64 [S], and a row the mean of its units.
    """
    layout, bounds = goal.layout, frame_bounds(goal.layout)
    row = torch.arange(layout.total, dtype=torch.int64, device=tokens.device)
    k_static, k_dynamic = quotas
    k_cluster = part_of(k_dynamic, contextual)
    salient = best_of(salience, units.dynamic, bounds, k_dynamic - k_cluster)
    if unit_values is None:
        x, _ = ops.merge(tokens, *ops.group(units.head, layout.total), as_weights(goal.sizes, tokens))
    else:
        x = unit_values(tokens, units.head)
    parts = [(k_static, units.static)] + [(k_cluster, units.dynamic & ~salient)] * bool(contextual[0])
    centre, rank = torch.full_like(row, -1), squashed(salience)
    for k, valid in parts:
        slot, centres, density = ops.density_cluster(
            x, bounds, slots(k), layout.total, neighbours=neighbours, valid=valid
        )
        centre = torch.where(density.isnan(), centre, torch.maximum(centre, at(centres, slot)))
        rank = torch.where(valid, squashed(density), rank)
    wanted, unit = salient | (centre == row), units.static | units.dynamic
    score = (rank + 2 * wanted + 2 * unit).masked_fill(layout.extra_mask(), torch.inf)
    index, cu_seqlens, counts = goal.choose(score)
    slot = slots_of(index, layout)
    joined = torch.where(slot >= 0, slot, at(slot, centre))[units.head]
    assignment = torch.where(slot >= 0, slot, joined)
    core = (assignment >= 0) & (slot[units.head] == assignment)
    shares = pulled(assignment, core, goal.rows, blend, goal.sizes) if blend else None
    values = None
    if unit_values is not None:
        head, once = torch.where(slot >= 0, row, units.head), torch.where(unit | (slot >= 0), assignment, -1)
        values = partial(mean_of_units, unit_values, head, ops.group(once, goal.rows))
    return Merged(index, assignment, cu_seqlens, counts, score, shares=shares, values=values)


def mean_of_units(
    unit_values: Callable[[Tensor, Tensor], Tensor], head: Tensor, groups: tuple[Tensor, Tensor], rows: Tensor
) -> Tensor:
    """The rows [K, D] that ``groups`` make of units, each made of ``rows`` [S, D] that stand at ``head`` int64 [S]."""
    return ops.merge(unit_values(rows, head), *groups)[0]


def pulled(
    assignment: Tensor, core: Tensor, k: int, blend: float, sizes: Tensor | None = None, *, add: bool = False
) -> Tensor:
    """float32 [S]: what each row weighs in the mean of its group, so that the group's core has a share of its own.

    The rows of ``core`` bool [S] have together the share ``blend``; or, to add, their mean has it and the rest of the
    value is the mean of all, the core's included. Rows of one kind weigh as their ``sizes``, one without.
    """
    own = torch.ones_like(assignment, dtype=torch.float32) if sizes is None else sizes
    total, middle = sum_members(assignment, k, own), sum_members(torch.where(core, assignment, -1), k, own)
    more = blend / (1 - blend) * (total if add else total - middle) / middle
    both = (middle > 0) & (middle < total)
    factor = torch.where(both, 1 + more if add else more, 1)
    return own * torch.where(core, pad(factor, (0, 1))[assignment], 1)


def salience_of(name: str, attention: Tensor | None, tokens: Tensor, layout: Layout) -> Tensor:
    """float32 [S]: the attention given, or else how far each token's cosine to the mean of its frame is from 1."""
    if attention is None:
        means = frame_means(tokens, layout)[frames_of_rows(layout)[0]]
        return 1 - torch.nn.functional.cosine_similarity(tokens.to(torch.float32), means.to(torch.float32), dim=-1)
    if not attention.is_floating_point() or attention.dim() != 1 or attention.shape[0] != layout.total:
        got = f"{attention.dtype} {tuple(attention.shape)}"
        raise ValueError(f"method {name!r}: expected attention of floats [{layout.total}], got {got}")
    return attention.detach().to(torch.float32)


def best_of(score: Tensor, mask: Tensor, bounds: Tensor, k: Tensor) -> Tensor:
    """bool [S]: the ``k`` int64 [F] rows with the best scores of those in ``mask`` of each frame."""
    finite = torch.where(mask, score.nan_to_num(-LARGEST, LARGEST, -LARGEST), -torch.inf)
    best = ops.topk(finite, bounds, slots(k), mask.shape[0])
    spare = pad(torch.zeros_like(mask), (0, 1))  # the last one takes the padding
    return spare.index_fill(0, torch.where(best < 0, mask.shape[0], best), True)[:-1] & mask


def squashed(score: Tensor) -> Tensor:
    """float32 in [0, 1] in the order of ``score``; NaN stays."""
    x = score.to(torch.float32).clamp(-LARGEST / 2, LARGEST / 2)
    return (x / (1 + x.abs()) + 1) / 2


def frames_of_rows(layout: Layout) -> tuple[Tensor, Tensor]:
    """(int64 [S] the frame of each row, some frame after the grids; bool [S] rows of a frame)."""
    frame = layout.frame_of(torch.arange(layout.total, dtype=torch.int64, device=layout.device))
    return frame.clamp(max=layout.frames - 1), frame < layout.frames


def frame_bounds(layout: Layout) -> Tensor:
    """int64 [F+1]: where the rows of each frame begin; rows after a grid come with the frame before, or the first."""
    first, _ = layout.frame_starts()
    return torch.cat([layout.cu_seqlens[:1], first[1:], layout.cu_seqlens[-1:]])


def head_rows(windows: Tensor, layout: Layout) -> Tensor:
    """int64 [S]: the row of each row's site in the first frame of its window; itself after the grids."""
    row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    frame, inside = frames_of_rows(layout)
    frames = torch.where(inside, frame - windows[frame], 0)
    return row - frames * layout.tokens_per_frame[layout.video_of(row)]


def plan_segments(layout: Layout, plan: Plan) -> Tensor:
    """int64 [F]: the segment of the plan that each frame is in."""
    first, _ = layout.frame_starts()
    return (torch.searchsorted(plan.segments, first, right=True) - 1).clamp(0, plan.segments.shape[0] - 2)


def frame_quotas(layout: Layout, plan: Plan) -> Tensor:
    """int64 [F]: each frame's share of the budget, up to its end less up to its beginning, both rounded down."""
    here, (first, sites) = plan_segments(layout, plan), layout.frame_starts()
    rows, kept = plan.segments.diff()[here].clamp(min=1), plan.cu_k.diff()[here]
    before = first - plan.segments[here]
    return kept * (before + sites) // rows - kept * before // rows


def without_frames(goal: Goal) -> Merged:
    """Of a batch without frames: the rows after the grids."""
    score = torch.full((goal.layout.total,), torch.inf, device=goal.layout.device)
    index, cu_seqlens, counts = goal.choose(score)
    return Merged(index, slots_of(index, goal.layout), cu_seqlens, counts, score)


def expect_budget(name: str, goal: Goal) -> Plan:
    if goal.plan is None:
        raise ValueError(f"method {name!r}: expected a budget, got a threshold")
    return goal.plan


def share_of(name: str, option: str, value: float | Fraction) -> tuple[int, int]:
    """A share in [0, 1] as numerator and denominator; a float is the decimal that it prints as."""
    if not 0 <= value <= 1:
        raise ValueError(f"method {name!r}: expected {option} as a share in [0, 1], got {value}")
    # A symbolic float becomes a constant; its text would not trace.
    return _reduced(float.fromhex(value.hex()) if isinstance(value, float) else value)


@constant_in_graph
def _reduced(share: float | Fraction) -> tuple[int, int]:
    exact = Fraction(str(share))
    return exact.numerator, exact.denominator


def part_of(k: Tensor, share: tuple[int, int]) -> Tensor:
    """What is left of ``k`` after its rest of that share, rounded half to even, as Python rounds."""
    numerator, denominator = share
    twice = 2 * k * (denominator - numerator)
    rest = (twice + denominator) // (2 * denominator)
    odd_tie = ((twice + denominator) % (2 * denominator) == 0) & (rest % 2 == 1)
    return k - rest + odd_tie


def slots(k: Tensor) -> Tensor:
    """int64 [F+1]: where the slots of each part begin."""
    return pad(k.cumsum(0), (1, 0))


def at(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``, -1 where that is -1."""
    return pad(values, (0, 1), value=-1)[index]
