"""compress: score, decide, move, in one call and within one budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok import methods, ops
from vtok.decide import Floor, Goal, Plan, frame_floor
from vtok.layout import Layout, whole_number
from vtok.packed import Packed, as_weights, sum_members


def compress(
    tokens: Tensor,
    grid_thw: Any = None,
    *,
    budget: Any = None,
    total_budget: Any = None,
    threshold: float | None = None,
    capacity: int | None = None,
    method: str = "evs",
    merge_size: int = 1,
    extra_rows: int = 0,
    min_per_frame: int = 0,
    scores: Any = None,
    weights: Tensor | None = None,
    query: Tensor | None = None,
    frames: Tensor | None = None,
    timestamps: Tensor | None = None,
    **options: Any,
) -> Packed:
    """Keep the rows of a batch of videos that matter most: exactly as many as the budget says.

    Args:
        tokens: float32, float16, bfloat16 or float64, of shape [B, T, N, D], [B, T, H, W, D], or packed [S, D] with
            ``grid_thw``. (uint8 and others too, where the method never looks at them.)
        grid_thw: host integers [V, 3] (lists, NumPy or a CPU tensor), or a Layout built from them outside the graph;
            h and w are divided by ``merge_size``. For [B, T, N, D] it tells the positions' rows and columns, which
            otherwise are (t, 0, site).
        budget: rows of each video: an int, a share (Fraction, "25%", or a float, read as the decimal it prints as and
            rounded down), a list with one of those per video, a nested list with one per frame, or a Plan. Without
            any of the three the method's own budget holds, where it has one.
        total_budget: rows of the whole batch instead: an int or a share, divided among the videos in proportion to
            their rows by largest remainder.
        threshold: instead of a budget, keep the rows with a score above it (a NaN never is); ``capacity`` (int) rows
            are allocated for them, all rows by default. What is left over is padding, what does not fit is dropped with
            all that joined it; see Packed.counts and trim.
        method: a name in ``vtok.methods.names("score", "merge")``; ``options`` are its own.
        extra_rows: rows of each video after its grid in packed tokens: always kept, outside the budget.
        min_per_frame: rows that each frame keeps at least, or all of a smaller one, whatever the scores.
        scores: [S], one floating-point number per row, the largest kept, or a callable of (tokens [S, D], layout)
            that returns them. Replaces the method's; compared as float32.
        weights: float32 [S], how many rows each row already stands for (the ``weight`` of an earlier round): means are
            weighted by them and ``Packed.weight`` is their sum, so that rounds add up to one; see ``Packed.then``.
        query, frames, timestamps: what some methods look at besides the tokens; given to one that does not: TypeError.

    Returns:
        Packed, rows in (video, t, h, w) order. The result meets the budget exactly; it has fewer rows only when the
        input is smaller. Ties go to the lower row, NaN comes last. A video's rows do not depend on the rest of the
        batch (except under ``total_budget``). Differentiable in ``tokens``; the decision is not.

    Raises:
        ValueError or TypeError, before anything runs: impossible budgets and floors, shapes that do not match, a grid
        on the device (reading it would wait).

    Never syncs. Works inside ``torch.compile(fullgraph=True, dynamic=True)`` and in a CUDA graph with dense tokens or
    a Layout; lists and ``min_per_frame`` then need a Plan made outside and kept as long as the graph. Reads the tokens
    once and writes the kept rows once; extra memory at most 16 bytes a row.
    """
    rows, layout = as_rows(tokens, grid_thw, merge_size, extra_rows)
    inputs = {"query": query, "frames": frames, "timestamps": timestamps}
    options |= {name: value for name, value in inputs.items() if value is not None}
    chosen = methods.get(method, "score", "merge")
    if scores is None:
        chosen.check_options(options)
    if budget is None and total_budget is None and threshold is None and scores is None and chosen.budget:
        budget = own_budget(layout, chosen, options)
    goal = make_goal(layout, budget, total_budget, threshold, capacity, min_per_frame)
    expect_sizes(weights, layout)
    goal.sizes = weights
    if scores is None and chosen.kind == "merge":
        return move(rows, chosen.call(rows.detach(), layout, goal, **options), goal, weights)
    score = score_rows(rows, layout, goal.plan, chosen, scores, options)
    index, cu_seqlens, counts = goal.choose(score.detach())
    values = ops.pack(rows, index)
    return Packed(
        values, index, cu_seqlens, layout, scores=score, counts=counts, longest=goal.longest, sizes=weights,
        weight=None if weights is None else ops.pack(weights[:, None], index)[:, 0], is_merged=False,
    )  # fmt: skip


def own_budget(layout: Layout, chosen: methods.Method, options: dict) -> Any:
    """The method's own budget for the layout."""
    if _in_graph(layout.device):
        raise ValueError(f"expected a budget inside a graph: method {chosen.name!r} counts its own outside, for a Plan")
    return chosen.rows_of_each_frame(layout.grids, options)


def expect_sizes(weights: Tensor | None, layout: Layout) -> None:
    if weights is None:
        return
    if not isinstance(weights, Tensor) or weights.dtype != torch.float32:
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"expected weights as a float32 tensor, got {got}")
    if weights.dim() != 1 or weights.shape[0] != layout.total:
        raise ValueError(f"expected weights of shape ({layout.total},), got {tuple(weights.shape)}")


def make_goal(
    layout: Layout, budget: Any, total_budget: Any, threshold: float | None, capacity: int | None, min_per_frame: int
) -> Goal:
    """What a call asks for, of its three ways to say it."""
    if threshold is None:
        if capacity is not None:
            raise ValueError("expected capacity with a threshold only")
        plan = make_plan(layout, budget, total_budget, min_per_frame)
        return Goal(layout, plan, 0.0, plan.k, plan.longest)
    if budget is not None or total_budget is not None:
        raise ValueError("expected one of budget, total_budget and threshold, got more")
    room = layout.total if capacity is None else whole_number("capacity", capacity, least=0)
    return Goal(layout, None, threshold, room, room, make_floor(layout, min_per_frame))


def move(rows: Tensor, merged: methods.Merged, goal: Goal, sizes: Tensor | None = None) -> Packed:
    """The output rows of a merge."""
    assignment, reduce = merged.assignment, merged.reduce
    if merged.values is not None:
        values, weight = merged.values(rows), sum_members(assignment, goal.rows, sizes)
    elif reduce == "first":
        values, weight = ops.pack(rows, merged.index), sum_members(assignment, goal.rows, sizes)
    else:
        weights = sizes if merged.shares is None else merged.shares
        lists = ops.group(assignment, goal.rows)
        values, weight = ops.merge(rows, *lists, as_weights(weights, rows), reduce=reduce)
        if merged.shares is not None:
            weight = sum_members(assignment, goal.rows, sizes)
    return Packed(
        values, merged.index, merged.cu_seqlens, goal.layout, scores=merged.scores, counts=merged.counts,
        longest=goal.longest, weight=weight.to(torch.float32), assignment=assignment, is_merged=reduce != "first",
        sizes=sizes, shares=merged.shares, gap=merged.gap, order=merged.order, as_released=merged.values is not None,
    )  # fmt: skip


def as_rows(tokens: Tensor, grid_thw: Any, merge_size: int, extra_rows: int) -> tuple[Tensor, Layout]:
    """Tokens of any accepted shape as rows [S, D], and their layout."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"expected tokens as a tensor, got {type(tokens).__name__}")
    if tokens.dim() not in (2, 4, 5):
        raise ValueError(f"expected tokens [B, T, N, D], [B, T, H, W, D] or [S, D], got {tuple(tokens.shape)}")
    rows = tokens if tokens.dim() == 2 else tokens.flatten(0, -2)
    if grid_thw is None:
        if tokens.dim() == 2:
            raise ValueError("expected grid_thw with packed tokens [S, D], got None")
        if extra_rows or merge_size != 1:
            raise ValueError("expected extra_rows=0 and merge_size=1 without grid_thw")
        videos, t, h, w = (*tokens.shape[:2], 1, tokens.shape[2]) if tokens.dim() == 4 else tokens.shape[:4]
        return rows, Layout.uniform(videos, t, h, w, device=tokens.device)
    if not isinstance(grid_thw, Layout):
        layout = Layout.from_grid(grid_thw, merge_size, extra_rows, device=tokens.device)
    elif extra_rows or merge_size != 1:
        raise ValueError("expected extra_rows and merge_size when the Layout is made, got them with it")
    else:
        layout = grid_thw
    if layout.device != tokens.device:
        raise ValueError(f"expected a Layout on {tokens.device} like the tokens, got one on {layout.device}")
    if layout.total != rows.shape[0]:
        raise ValueError(f"expected tokens of {layout.total} rows, as grid_thw says, got {rows.shape[0]}")
    return rows, layout


def make_plan(layout: Layout, budget: Any, total_budget: Any, min_per_frame: int) -> Plan:
    """The plan of a budget: given, remembered from the last call with this layout, or made."""
    if (budget is None) == (total_budget is None):
        raise ValueError("expected one of budget, total_budget and threshold")
    if isinstance(budget, Plan):
        if min_per_frame:
            raise ValueError("expected min_per_frame when the Plan is made, got it with one")
        if (budget.total, budget.cu_seqlens.shape) != (layout.total, layout.cu_seqlens.shape):
            raise ValueError(f"expected a Plan for {layout.total} rows of {layout.videos} videos, got another layout's")
        return budget
    if _in_graph(layout.device):
        _expect_no_floor(min_per_frame)
        return Plan.in_graph(layout, budget=budget, total_budget=total_budget)
    key = (repr(budget), repr(total_budget), min_per_frame)
    given = {"budget": budget, "total_budget": total_budget, "min_per_frame": min_per_frame}
    return _cached(layout, key, lambda: Plan.of(layout, **given))


def make_floor(layout: Layout, min_per_frame: int) -> Floor | None:
    """What min_per_frame keeps whatever the threshold: remembered from the last call, or made."""
    if _in_graph(layout.device):
        _expect_no_floor(min_per_frame)
        return None
    return _cached(layout, ("floor", min_per_frame), lambda: frame_floor(layout, min_per_frame))


def _in_graph(device: torch.device) -> bool:
    """Whether this call is being compiled or captured: then nothing may be copied from the host."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _expect_no_floor(min_per_frame: int) -> None:
    if min_per_frame:
        raise ValueError("expected min_per_frame=0 inside a graph: a Plan made outside of it can have one")


def _cached(layout: Layout, key: tuple, make: Any) -> Any:
    """What ``make()`` returned for the layout's last key on this stream: a repeated call copies nothing."""
    if layout.device.type in ("cuda", "xpu"):
        key = (*key, torch.get_device_module(layout.device).current_stream(layout.device).stream_id)
    last = vars(layout).get("_last")
    if last is None or last[0] != key:
        last = vars(layout)["_last"] = key, make()
    return last[1]


def score_rows(
    rows: Tensor, layout: Layout, plan: Plan | None, chosen: methods.Method, scores: Any, options: dict
) -> Tensor:
    """float32 [S] from the method or from the caller; +inf for rows after the grids."""
    if scores is None:
        chosen.check_options(options)
        score = chosen.call(rows.detach(), layout, plan, **options)
    else:
        if options:
            raise TypeError(f"expected no options with scores, got {', '.join(sorted(options))}")
        score = scores(rows, layout) if callable(scores) else scores
        if not isinstance(score, Tensor) or not score.is_floating_point():
            raise TypeError("expected scores as a floating-point tensor, or a callable that returns one")
        if score.dim() != 1 or score.shape[0] != layout.total:
            raise ValueError(f"expected scores of shape ({layout.total},), got {tuple(score.shape)}")
        score = score.to(torch.float32)
    return score.masked_fill(layout.extra_mask(), torch.inf) if layout.extra_rows else score


class Compressor(torch.nn.Module):
    """``compress`` with its settings, as a module without parameters: ``Compressor(budget=0.25)(tokens, grid_thw)``.

    Takes every keyword of ``compress`` except the per-call inputs ``scores``, ``weights``, ``query``, ``frames`` and
    ``timestamps``, which ``forward`` takes.
    """

    def __init__(self, *, method: str = "evs", **settings: Any) -> None:
        super().__init__()
        known = {"budget", "total_budget", "threshold", "capacity", "merge_size", "extra_rows", "min_per_frame"}
        options = {name: value for name, value in settings.items() if name not in known}
        chosen = methods.get(method, "score", "merge")
        chosen.check_options(options)
        told = sum(settings.get(name) is not None for name in ("budget", "total_budget", "threshold"))
        if told > 1 or (not told and chosen.budget is None):
            raise ValueError("expected one of budget, total_budget and threshold")
        self.method, self.settings = method, settings

    def forward(self, tokens: Tensor, grid_thw: Any = None, **inputs: Any) -> Packed:
        return compress(tokens, grid_thw, method=self.method, **self.settings, **inputs)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {"method": self.method, **self.settings}.items())
