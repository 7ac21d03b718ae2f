"""Decide: which rows stay, from one number per row, in index space and without a sync."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vtok import ops
from vtok.budget import counts, frame_floors, share
from vtok.layout import Layout, constant_in_graph, cumulative, upload, whole_number

LIMIT = 2**31  # rows up to which a share is exact in int64


@dataclass(eq=False)
class Floor:
    """The rows that each frame keeps first, and what the rest of the budget is for."""

    k: int
    segments: Tensor
    cu_k: Tensor
    rest_rows: int
    rest_k: int
    rest_segments: Tensor
    rest_cu_k: Tensor


@dataclass(eq=False)
class Plan:
    """A budget made ready for one layout: host integers to allocate with, device tensors to decide with.

    ``compress`` makes one for each budget that it meets. Made outside, ``Plan.of(layout, budget=...)``, it is itself a
    budget: for a compiled graph or a CUDA graph, where every form of budget then works and nothing is copied.

    Fields:
        total: rows of the layout. k: rows kept in all, extra rows included. longest: those of the longest video.
        extra_rows: rows after each grid, which are always kept.
        shared: whether ``total_budget`` made it: a method may divide the whole budget otherwise.
        cu_seqlens: int64 [V+1], where each video starts in the output.
        segments, cu_k: int64 [G+1] each: rows [segments[g], segments[g+1]) fill the slots [cu_k[g], cu_k[g+1]).
        floor: what ``min_per_frame`` takes first, or None.
        on_host: rows and slots of each segment, as host integers; None where it was made inside a graph.
    """

    total: int
    k: int
    longest: int
    extra_rows: int
    shared: bool
    cu_seqlens: Tensor
    segments: Tensor
    cu_k: Tensor
    floor: Floor | None = None
    on_host: list[tuple[int, int]] | None = None

    @classmethod
    def of(cls, layout: Layout, *, budget: Any = None, total_budget: Any = None, min_per_frame: int = 0) -> Plan:
        """Make a budget ready for ``layout``; the arguments and errors of ``vtok.plan``. Runs outside a graph."""
        device, extra = layout.device, layout.extra_rows
        kept = counts(layout.grids, budget, total_budget, min_per_frame)
        rows = [extra + (sum(k) if isinstance(k, list) else k) for k in kept]
        segments, cu_k = layout.cu_seqlens, upload(cumulative(rows), device)
        cu_seqlens, sizes, quotas = cu_k, [t * h * w for t, h, w in layout.grids], rows
        if extra or any(isinstance(quota, list) for quota in kept):
            sizes, quotas = [], []
            for (t, h, w), quota in zip(layout.grids, kept, strict=True):
                sizes += ([h * w] * t if isinstance(quota, list) else [t * h * w]) + [extra]
                quotas += (quota if isinstance(quota, list) else [quota]) + [extra]
            segments, cu_k = upload(cumulative(sizes), device), upload(cumulative(quotas), device)
        return cls(
            total=layout.total,
            k=sum(rows),
            longest=max(rows, default=extra),
            extra_rows=extra,
            shared=total_budget is not None,
            cu_seqlens=cu_seqlens,
            segments=segments,
            cu_k=cu_k,
            floor=_floor(layout, kept, min_per_frame) if min_per_frame else None,
            on_host=list(zip(sizes, quotas, strict=True)),
        )

    @classmethod
    def in_graph(cls, layout: Layout, *, budget: Any = None, total_budget: Any = None) -> Plan:
        """The same for one int or share, with tensor arithmetic alone: what runs inside a graph."""
        extra, videos = layout.extra_rows, layout.videos
        available = layout.total - videos * extra

        def kept(sizes: Any) -> Any:
            if total_budget is None:
                return _rows_of(budget, sizes)
            return _largest_remainder(sizes, _rows_of(total_budget, available), available)

        rows = kept(layout.grid_rows)
        if layout.grid_of_each is None:
            on_host = kept(layout.rows_on_host)
            total, longest = torch.ops.vtok.host_sum(on_host), torch.ops.vtok.host_max(on_host)
        elif total_budget is None:
            t, h, w = layout.grid_of_each
            longest = kept(t * h * w)
            total = videos * longest
        else:
            longest = -(-_rows_of(total_budget, available) // torch.sym_max(videos, 1))
        if total_budget is not None:
            total = _rows_of(total_budget, available)
        ends, out_ends = layout.cu_seqlens[1:], (rows + extra).cumsum(0)
        bounds, slots = ends, out_ends
        if extra:
            bounds = torch.stack([ends - extra, ends], -1).flatten()
            slots = torch.stack([out_ends - extra, out_ends], -1).flatten()
        zero = layout.cu_seqlens.new_zeros(1)
        return cls(
            total=layout.total,
            k=total + videos * extra,
            longest=longest + extra,
            extra_rows=extra,
            shared=total_budget is not None,
            cu_seqlens=torch.cat([zero, out_ends]),
            segments=torch.cat([zero, bounds]),
            cu_k=torch.cat([zero, slots]),
        )

    @property
    def rows(self) -> Tensor:
        """int64 [V], rows that each video's grid keeps."""
        return self.cu_seqlens.diff() - self.extra_rows


def select(scores: Tensor, plan: Plan) -> Tensor:
    """int64 [plan.k]: the rows that the plan keeps, ascending; largest score first, ties to the lower row."""
    if plan.floor is None:
        return ops.topk(scores, plan.segments, plan.cu_k, plan.k)
    floor = plan.floor
    whole = torch.arange(2, dtype=torch.int64, device=scores.device) * scores.shape[0]
    keep = _mark(scores, ops.topk(scores, floor.segments, floor.cu_k, floor.k))
    rest, _ = ops.compact(~keep, whole, floor.rest_rows)
    best = ops.topk(scores[rest], floor.rest_segments, floor.rest_cu_k, floor.rest_k)
    index, _ = ops.compact(keep | _mark(scores, rest[best]), whole, plan.k)
    return index


def gate(keep: Tensor, scores: Tensor, layout: Layout, capacity: int, floor: Floor | None) -> tuple[Tensor, Tensor]:
    """(int64 [capacity] the rows to keep, then -1; int64 [V] how many there are).

    ``keep`` bool [S] is what passed the threshold; rows of the floor and rows after the grids are kept besides.
    """
    if layout.extra_rows:
        keep = keep | layout.extra_mask()
    if floor is not None:
        keep = keep | _mark(scores, ops.topk(scores, floor.segments, floor.cu_k, floor.k))
    return ops.compact(keep, layout.cu_seqlens, capacity)


@dataclass(eq=False)
class Goal:
    """How many rows to keep: a plan, or a threshold with room for some rows and a floor.

    Fields:
        rows: rows of the output.
        longest: those of the longest video at most.
        sizes: float32 [S], how many rows each row already stands for, or None for one each.
    """

    layout: Layout
    plan: Plan | None
    threshold: float
    rows: int
    longest: int
    floor: Floor | None = None
    sizes: Tensor | None = None

    def choose(self, scores: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows by score [S], or under a threshold those in ``keep`` bool [S] where it is given.

        Returns:
            int64 [rows], ascending, then -1; int64 [V+1], where each video starts among them; int64 [V], how many
            passed the threshold, or None under a plan.
        """
        if self.plan is not None:
            return select(scores, self.plan), self.plan.cu_seqlens, None
        keep = scores > self.threshold if keep is None else keep
        index, counts = gate(keep, scores, self.layout, self.rows, self.floor)
        return index, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).clamp(max=self.rows), counts


def frame_floor(layout: Layout, min_per_frame: int) -> Floor | None:
    """The floor alone, where a threshold decides the rest; made outside a graph."""
    if not whole_number("min_per_frame", min_per_frame, least=0):
        return None
    return _floor(layout, frame_floors(layout.grids, min_per_frame), min_per_frame)


def _floor(layout: Layout, kept: list[Any], min_per_frame: int) -> Floor:
    sizes, quotas, rest_sizes, rest_quotas = [], [], [], []
    for (t, h, w), quota in zip(layout.grids, kept, strict=True):
        nested = isinstance(quota, list)  # then every frame's share is settled, and no rest is left
        first = quota if nested else [min(min_per_frame, h * w)] * t
        sizes += [h * w] * t + [layout.extra_rows]
        quotas += [*first, layout.extra_rows]
        rest_sizes.append(t * h * w - sum(first))
        rest_quotas.append(0 if nested else quota - sum(first))
    return Floor(
        k=sum(quotas),
        segments=upload(cumulative(sizes), layout.device),
        cu_k=upload(cumulative(quotas), layout.device),
        rest_rows=sum(rest_sizes),
        rest_k=sum(rest_quotas),
        rest_segments=upload(cumulative(rest_sizes), layout.device),
        rest_cu_k=upload(cumulative(rest_quotas), layout.device),
    )


def _mark(scores: Tensor, rows: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, rows, True)


def _rows_of(budget: Any, available: Any) -> Any:
    """``budget.rows_of`` for an int, a symbolic int or a tensor of sizes."""
    if isinstance(budget, float):
        budget = float.fromhex(budget.hex())  # a symbolic float becomes a constant; its text would not trace
    if isinstance(budget, (Fraction, float, str)):
        numerator, denominator = _reduced(budget)
        return available * numerator // denominator
    if not isinstance(budget, (int, torch.SymInt)) or isinstance(budget, bool):
        raise TypeError("expected budget as an int or a share inside a graph: make a Plan.of outside of it")
    if budget < 1:
        raise ValueError("expected budget of at least 1")
    rows: Any = budget
    return available.clamp(max=rows) if isinstance(available, Tensor) else torch.sym_min(available, rows)


@constant_in_graph
def _reduced(budget: Fraction | float | str) -> tuple[int, int]:
    part = largest_below(share("budget", budget), LIMIT)
    return part.numerator, part.denominator


def largest_below(part: Fraction, limit: int) -> Fraction:
    """The largest fraction <= ``part`` with a denominator <= ``limit``: n·part rounds down alike for n <= limit."""
    near = part.limit_denominator(limit)
    if near <= part:
        return near
    # The neighbour below ``near`` among those fractions: p/q with near.p·q - near.q·p = 1 and the largest q.
    q = pow(near.numerator, -1, near.denominator) if near.denominator > 1 else 1
    q += (limit - q) // near.denominator * near.denominator
    return Fraction((near.numerator * q - 1) // near.denominator, q)


def _largest_remainder(sizes: Tensor, total: Any, available: Any) -> Tensor:
    """``budget.allocate`` in proportion to sizes that sum to ``available`` >= ``total``, as tensor arithmetic."""
    exact = sizes * total
    whole = torch.sym_max(available, 1)
    rows, remainder = exact // whole, exact % whole
    rank = torch.empty_like(rows).scatter_(
        0, remainder.argsort(descending=True, stable=True), torch.arange(rows.shape[0], device=rows.device)
    )
    return rows + (rank < total - rows.sum())


@torch.library.custom_op("vtok::host_sum", mutates_args=(), device_types="cpu")
def host_sum(values: Tensor) -> int:
    """The sum of a CPU tensor as a size: a compiled graph can allocate by it and nothing waits for a device."""
    return int(values.sum())


@torch.library.custom_op("vtok::host_max", mutates_args=(), device_types="cpu")
def host_max(values: Tensor) -> int:
    """The largest value of a CPU tensor, or 0, as a size."""
    return int(values.max()) if values.numel() else 0


@host_sum.register_fake
@host_max.register_fake
def _size(values: Tensor) -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()
