"""The methods: one module each, registered by name and found, never listed.

A method of kind "score" is a function ``score(tokens, layout, plan, **options) -> [S]``: one number for each row of a
packed batch, the largest kept. ``plan.rows`` is int64 [V], the rows that each video's grid will keep; ``plan`` is None
under a threshold. ``vtok.compress`` calls it.

A method of kind "merge" is a function ``merge(tokens, layout, goal, **options) -> Merged``: which row each row joins.
``goal.choose`` picks rows by score within the budget or over the threshold. ``vtok.compress`` calls it too.

A method of kind "gate" looks at pixels before the encoder: ``gate(frames, patch, tubelet, threshold, state, **options)
-> Gated``. ``vtok.gate_patches`` and ``vtok.Stream`` call it.

Ties, order, budget and positions are not a method's business: its callers see to them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

CALLERS = {"score": "vtok.compress", "merge": "vtok.compress", "gate": "vtok.gate_patches"}


@dataclass(frozen=True)
class Merged:
    """Which of S rows join which of K."""

    index: Tensor  # int64 [K], the row that each output row stands at, ascending, then -1
    assignment: Tensor  # int64 [S], the output row that each row joins, -1 where it is dropped
    cu_seqlens: Tensor  # int64 [V+1], where each video starts in the output
    counts: Tensor | None = None  # int64 [V], rows over the threshold, also those there was no room for
    scores: Tensor | None = None  # float32 [S], what the decision was made by
    reduce: str = "mean"  # what a row becomes of those that join it: their "mean", or "first" for itself
    shares: Tensor | None = None  # float32 [S], what each row weighs in that mean, if not its size
    order: Tensor | None = None  # int64 [K], the output rows as the method's release orders them
    gap: Tensor | None = None  # float64 [], how far from the best it may be at most, in summed squared error
    values: Callable[[Tensor], Tensor] | None = None  # rows [S, D] -> [K, D], where no mean by assignment gives them


class Gated(NamedTuple):
    """What a gate says of a batch of videos [B, T, C, H, W] with T' steps of h x w patches."""

    score: Tensor  # float32 [B, T', h, w], the largest kept under a budget
    keep: Tensor | None = None  # bool [B, T', h, w], what passes the threshold; None without one
    state: Any = None  # what the next chunk of the same videos starts from
    vectors: Tensor | None = None  # int64 [B, T', h, w, 2], (dy, dx) from each patch to its block in the step before


@dataclass(frozen=True)
class Method:
    """A registered method: its name, its kind, its function, and the options that this takes by keyword."""

    name: str
    kind: str
    call: Callable[..., Any]
    options: frozenset[str]
    budget: Callable[..., Any] | None = None  # (t, h, w), **options -> rows of each frame, unless the caller says

    def check_options(self, given: dict) -> None:
        unknown = sorted(set(given) - self.options)
        if unknown:
            takes = ", ".join(sorted(self.options)) or "none"
            raise TypeError(f"method {self.name!r}: expected options among ({takes}), got {', '.join(unknown)}")

    def rows_of_each_frame(self, grids: list[tuple[int, int, int]], options: dict) -> list[Any] | None:
        """The method's own budget, where it has one."""
        return None if self.budget is None else [self.budget(grid, **options) for grid in grids]

    @property
    def module(self) -> Any:
        return inspect.getmodule(self.call)


_methods: dict[str, Method] = {}


def register(
    name: str, kind: str = "score", budget: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that makes a function the method ``name``; its keyword-only arguments are the options."""
    if kind not in CALLERS:
        raise ValueError(f"expected a kind of method among {sorted(CALLERS)}, got {kind!r}")

    def add(call: Callable[..., Any]) -> Callable[..., Any]:
        if name in _methods:
            raise ValueError(f"expected a new method name, got {name!r}, which is registered")
        parameters = inspect.signature(call).parameters.values()
        options = frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
        _methods[name] = Method(name, kind, call, options, budget)
        return call

    return add


def names(*kinds: str) -> list[str]:
    """The names of all methods, or of those of some kinds, sorted."""
    return sorted(name for name, method in _methods.items() if not kinds or method.kind in kinds)


def get(name: str, *kinds: str) -> Method:
    """The method of that name; ValueError for an unknown one, or one of other kinds."""
    if name not in _methods:
        raise ValueError(f"expected one of the methods {names(*kinds)}, got {name!r}")
    method = _methods[name]
    if kinds and method.kind not in kinds:
        known = f"expected one of the methods {names(*kinds)}"
        raise ValueError(f"{known}, got {name!r}, which is for {CALLERS[method.kind]}")
    return method


for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")
