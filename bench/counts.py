"""Operators and host syncs in one call of each method, beside those of the published implementations.

Counted where the dispatcher calls them, views included, on one clip of 32×14×14×256 with the layout and the budget made
ready, as a server does; an operator of vtok is one, as it is to the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vtok
from vtok import Layout, methods
from vtok.decide import Plan

CLIP, CHANNELS = (32, 14, 14), 256
# (operators, host syncs) of the same clip, counted alike, but up to the mask or the merged rows, without positions.
PUBLISHED = {
    "evs": (18, 0),
    "vidcom2": (134, 1),
    "fastvid": (371, 68),
    "dycoke": (421, 0),
    "framefusion": (83, 9),
    "holitom": (4786, 1369),
}
# What makes the host wait for the device: a value is read, or a size depends on the data.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}


class Count(TorchDispatchMode):
    """Counts what is dispatched inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        self.syncs += waits(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def waits(func: Any, args: tuple, kwargs: dict) -> bool:
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):  # by a mask
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITS


def ask(method: str, layout: Layout) -> dict[str, Any]:
    """A quarter of the rows; of a method that has thresholds alone that, and what else it needs."""
    if method == "b_vllm":
        return {"threshold": 0.5, "distributions": torch.rand(layout.frames, 8, device=layout.device)}
    return {"budget": Plan.of(layout, budget="25%")}


def count(method: str, device: torch.device) -> Count:
    """One call of a method that takes tokens, positions included."""
    layout = Layout.from_grid([CLIP], device=device)
    tokens = torch.randn(layout.total, CHANNELS, device=device, dtype=torch.bfloat16)
    asked = ask(method, layout)
    with Count() as counted:
        packed = vtok.compress(tokens, layout, method=method, **asked)
        assert packed.positions.shape[0] == packed.values.shape[0]
    return counted


def measure(device: torch.device) -> list[dict[str, Any]]:
    """Of each method its counts, and the published ones where they are known."""
    found = []
    for method in methods.names("score", "merge"):
        counted, published = count(method, device), PUBLISHED.get(method)
        found.append({"method": method, "operators": counted.operators, "syncs": counted.syncs, "published": published})
    return found


def sentence(counted: dict[str, Any]) -> str:
    beside = "" if counted["published"] is None else " (published: {} and {})".format(*counted["published"])
    return f"{counted['method']}: {counted['operators']} operators, {counted['syncs']} host syncs{beside}"
