"""Budgets: how many rows each video keeps. Integers on the host alone, before any tensor exists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from vtok import methods
from vtok.layout import host_grids, whole_number

Grid = tuple[int, int, int]


def plan(
    grid_thw: Any,
    *,
    budget: Any = None,
    method: str = "evs",
    merge_size: int = 1,
    text_tokens: int = 0,
    context: int | None = None,
    total_budget: Any = None,
    min_per_frame: int = 0,
    **options: Any,
) -> list[int]:
    """Rows that each video keeps, known before any tensor exists.

    A processor that writes placeholders and a model that calls ``compress`` share it: the list is itself a budget,
    and ``compress(budget=plan(...))`` meets it exactly.

    Args:
        grid_thw: host integers of shape (V, 3); h and w are divided by ``merge_size``.
        budget: an int (rows of each video), a share of its rows (Fraction, "25%", or a float read as the decimal it
            prints as, rounded down), a list of those per video, a nested list per frame, or None for the method's own,
            where it has one, and else for every row.
        method: the name of the method that will run; ``options`` are its own.
        total_budget: instead of ``budget``: an int or a share for the whole batch, divided among the videos in
            proportion to their rows by largest remainder (ties to the earlier video).
        min_per_frame: rows that each frame keeps at least, or all of a smaller frame.
        text_tokens, context: rows in all are at most ``context - text_tokens``; what is too much is cut in proportion
            by largest remainder. Count rows outside the grids (newlines) among the text.

    Returns:
        One int per video, without extra rows.

    Raises:
        ValueError: an impossible budget, naming the floor that it violates; TypeError: an argument of another kind.
    """
    chosen = methods.get(method)
    chosen.check_options(options)
    grids = host_grids(grid_thw, merge_size)
    if budget is None and total_budget is None:
        budget = chosen.rows_of_each_frame(grids, options) or Fraction(1)
    rows: list[int] = [
        sum(row) if isinstance(row, list) else row for row in counts(grids, budget, total_budget, min_per_frame)
    ]
    if context is None:
        return rows
    room = whole_number("context", context, least=1) - whole_number("text_tokens", text_tokens, least=0)
    wanted = sum(rows)
    if room < 1 and wanted:
        raise ValueError(f"expected text_tokens below context={context}, got {text_tokens}: no row fits")
    total, floors = min(max(room, 0), wanted), frame_floors(grids, min_per_frame)
    if sum(floors) > total:
        raise ValueError(f"min_per_frame={min_per_frame} needs {sum(floors)} rows, the context leaves {room}")
    return allocate(rows, total, floors=floors, caps=rows)


def counts(grids: list[Grid], budget: Any, total_budget: Any = None, min_per_frame: int = 0) -> list[Any]:
    """Rows per video, or per frame of each video where ``budget`` is a nested list; every floor is met."""
    if (budget is None) == (total_budget is None):
        raise ValueError("expected one of budget and total_budget, got " + ("none" if budget is None else "both"))
    floors, sizes = frame_floors(grids, min_per_frame), [t * h * w for t, h, w in grids]
    if total_budget is not None:
        total = rows_of("total_budget", total_budget, sum(sizes))
        if sum(floors) > total:
            raise ValueError(f"min_per_frame={min_per_frame} needs {sum(floors)} rows, total_budget gives {total}")
        return allocate(sizes, total, floors=floors, caps=sizes)
    if not isinstance(budget, (list, tuple)):
        budget = [budget] * len(grids)
        least = 1
    else:
        least = 0
    if len(budget) != len(grids):
        raise ValueError(f"expected budget with one entry per video ({len(grids)}), got {len(budget)}")
    rows = [_of_video(b, grid, least, min_per_frame) for b, grid in zip(budget, grids, strict=True)]
    for video, (kept, floor) in enumerate(zip(rows, floors, strict=True)):
        if not isinstance(kept, list) and kept < floor:
            raise ValueError(f"min_per_frame={min_per_frame} needs {floor} rows of video {video}, budget gives {kept}")
    return rows


def _of_video(budget: Any, grid: Grid, least: int, min_per_frame: int) -> int | list[int]:
    t, sites = grid[0], grid[1] * grid[2]
    if not isinstance(budget, (list, tuple)):
        return rows_of("budget", budget, t * sites, least)
    if len(budget) != t:
        raise ValueError(f"expected budget with one entry per frame ({t}), got {len(budget)}")
    rows = [rows_of("budget", b, sites, 0) for b in budget]
    if rows and min(rows) < min(min_per_frame, sites):
        raise ValueError(f"min_per_frame={min_per_frame} needs that many rows of each frame, budget gives {min(rows)}")
    return rows


def rows_of(name: str, budget: Any, available: int, least: int = 1) -> int:
    """Rows that one int or share buys: never more than there are; a share is rounded down."""
    if isinstance(budget, (Fraction, float, str)):
        part = share(name, budget)
        return available * part.numerator // part.denominator
    return min(whole_number(name, budget, least=least), available)


def share(name: str, budget: Fraction | float | str) -> Fraction:
    """A share in (0, 1]. A float is the decimal that it prints as: 0.1 is 1/10, not the double nearest to it."""
    try:
        if isinstance(budget, str):
            if not budget.endswith("%"):
                raise ValueError
            part = Fraction(budget[:-1].strip()) / 100
        else:
            part = Fraction(repr(float(budget))) if isinstance(budget, float) else budget
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'expected {name} as rows (int) or a share (Fraction, float, "25%"), got {budget!r}') from None
    if not 0 < part <= 1:
        raise ValueError(f"expected {name} as a share in (0, 1], got {budget!r} (a number of rows is an int)")
    return part


def frame_floors(grids: list[Grid], min_per_frame: int) -> list[int]:
    """Rows of each video that ``min_per_frame`` demands; a frame with fewer rows keeps all of them."""
    least = whole_number("min_per_frame", min_per_frame, least=0)
    return [t * min(least, h * w) for t, h, w in grids]


def allocate(
    weights: Sequence[float | Fraction],
    total: int,
    *,
    floors: Sequence[int] | None = None,
    caps: Sequence[int] | None = None,
) -> list[int]:
    """Divide ``total`` in proportion to ``weights`` by largest remainder, in exact arithmetic.

    Every item gets the floor of its exact part, then the largest fractional parts one more (ties to the lower index).
    Parts below a floor or above a cap are fixed there and the rest is divided again. The sum is exactly
    ``min(total, sum(caps))``. All weights zero means equal weights; a NaN weight is zero.

    Raises ValueError: a negative or infinite weight, floors above their caps, or floors that need more than ``total``.
    """
    if any(math.isinf(w) or w < 0 for w in weights):
        raise ValueError(f"expected weights that are finite and not negative, got {list(weights)}")
    floors = [0] * len(weights) if floors is None else list(floors)
    caps = [total] * len(weights) if caps is None else list(caps)
    if any(f > c for f, c in zip(floors, caps, strict=True)) or sum(floors) > total:
        raise ValueError(f"expected floors within caps that sum to at most {total}, got {floors} and {caps}")
    exact = [Fraction(0) if math.isnan(w) else Fraction(w) for w in weights]
    result, open_items, left = [0] * len(exact), list(range(len(exact))), min(total, sum(caps))
    while open_items:
        parts = dict(zip(open_items, _divide([exact[i] for i in open_items], left), strict=True))
        clipped = {i: min(max(parts[i], floors[i]), caps[i]) for i in open_items}
        surplus = sum(clipped.values()) - left
        # Fix one side at a time, the one that weighs more: the other side may come free once that is settled.
        fixed = [i for i in open_items if surplus == 0 or (clipped[i] - parts[i]) * surplus > 0]
        for i in fixed:
            result[i] = clipped[i]
            left -= clipped[i]
        open_items = [i for i in open_items if i not in set(fixed)]
    return result


def _divide(weights: list[Fraction], total: int) -> list[int]:
    whole = sum(weights)
    parts = [total * w / whole if whole else Fraction(total, len(weights)) for w in weights]
    result = [math.floor(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (result[i] - parts[i], i))
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    return result
