"""The methods: one module each, registered by name and found, never listed.

A method is a function ``score(tokens, layout, plan, **options) -> [S]``: one number for each row of a packed batch, the
largest kept. ``plan.rows`` is int64 [V], the rows that each video's grid will keep; ``plan`` is None under a threshold.
Ties, order, budget and positions are not its business: ``vtok.compress`` sees to them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Method:
    """A registered method: its name, its score function, and the options that this takes by keyword."""

    name: str
    score: Callable[..., Tensor]
    options: frozenset[str]

    def check_options(self, given: dict) -> None:
        unknown = sorted(set(given) - self.options)
        if unknown:
            takes = ", ".join(sorted(self.options)) or "none"
            raise TypeError(f"method {self.name!r}: expected options among ({takes}), got {', '.join(unknown)}")


_methods: dict[str, Method] = {}


def register(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """A decorator that makes a score function the method ``name``; its keyword-only arguments are the options."""

    def add(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _methods:
            raise ValueError(f"expected a new method name, got {name!r}, which is registered")
        parameters = inspect.signature(score).parameters.values()
        options = frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
        _methods[name] = Method(name, score, options)
        return score

    return add


def names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted(_methods)


def get(name: str) -> Method:
    """The method of that name; ValueError for an unknown one."""
    if name not in _methods:
        raise ValueError(f"expected one of the methods {names()}, got {name!r}")
    return _methods[name]


for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")
