"""merge: what only it promises. The contract tests run over cases() by themselves.

The arithmetic is pinned (sums from +0 in list order, one division, one rounding), so outputs are compared bit for bit.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from rooms import FLOATS, Case, Error, from_numpy, generator, poisoned, randn, same_bits, to_numpy

import vtok
from vtok.ops._rooms import ROOMS

REDUCES = ("mean", "sum", "max")


def index(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def lists(rows: int, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random members, -1 among them, for groups of these sizes, and a few places that no group reads."""
    total = sum(sizes)
    members = torch.randint(-1, rows, (total + 2,), generator=generator(rows, sizes))
    return members, index([0, *np.cumsum(sizes)])


def uniform(rows: int, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(rows, generator=generator("weights", rows), dtype=torch.float32).to(dtype)


def cases() -> list[Case]:
    shapes = [(3, 1, [2, 3]), (9, 77, [0, 1, 9, 4]), (40, 256, [40, 0, 1, 70])]
    made = [
        Case(
            f"{s}x{d}-{reduce}-{str(dtype)[6:]}", (randn((s, d), dtype), *lists(s, sizes), weights), {"reduce": reduce}
        )
        for (s, d, sizes), reduce, weights in zip(shapes, REDUCES, (uniform(3), None, uniform(40)), strict=True)
        for dtype in FLOATS
    ]
    x, nan = randn((6, 40), torch.bfloat16), randn((6, 18), torch.float32)
    nan[1, ::2] = float("nan")
    nan[2] = -0.0
    one_each = index(range(6)), index(range(7))
    return [
        *made,
        Case("mean-weights", (x, *lists(6, [7, 0, 3]), uniform(6)), {"reduce": "mean"}),
        Case("more-groups-than-a-block", (randn((20, 130), torch.float16), *lists(20, [2] * 19))),
        Case("float64", (x.double(), *lists(6, [7, 0, 3]), uniform(6, torch.float64)), {"reduce": "mean"}),
        Case("one-each", (x, *one_each)),
        Case("no-groups", (x, index([0, 1]), index([0]))),
        Case("no-members", (x, index([]), index([0, 0, 0])), {"reduce": "max"}),
        Case("no-rows", (x[:0], index([-1, -1]), index([0, 1, 2]))),
        Case("no-columns", (x[:, :0], *lists(6, [2, 3]), uniform(6))),
        Case("only-padding", (x, index([-1, -1, 4]), index([0, 2, 3])), {"reduce": "max"}),
        Case("weights-zero", (x, index([0, 1, 2, 3]), index([0, 2, 4]), torch.tensor([0, 0, 2.0, 1, 0, 0]))),
        *(Case(f"nan-{reduce}", (nan, *lists(6, [3, 4, 1]), uniform(6)), {"reduce": reduce}) for reduce in REDUCES),
    ]


def grad_cases() -> list[Case]:
    tokens = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()
    made = index([4, -1, 0, 0, 2, 3, 1, 2]), index([0, 4, 4, 5, 7])  # a repeat, an empty group, an unread place
    return [
        Case(f"{reduce}-{name}", (tokens, *lists, w), {"reduce": reduce})
        for reduce in REDUCES
        for name, lists in {
            "lists": made,
            "empty": (index([]), index([0, 0])),
            "none": (index([1]), index([0])),
        }.items()
        for w in (None, weights)
    ]


def errors() -> list[Error]:
    x, members, offsets = torch.randn(5, 7), index([0, 1]), index([0, 1, 2])
    return [
        Error("vtok::merge: expected tokens of shape (S, D), got (7,)", (x[0], members, offsets)),
        Error(
            "vtok::merge: expected tokens of dtype float32, float16, bfloat16 or float64, got int64",
            (x.long(), members, offsets),
        ),
        Error("vtok::merge: expected members of shape (M,), got (1, 2)", (x, members[None], offsets)),
        Error("vtok::merge: expected offsets of dtype int64, got int32", (x, members, offsets.int())),
        Error("vtok::merge: expected offsets of shape (K+1,), got (0,)", (x, members, offsets[:0])),
        Error("vtok::merge: expected weights of shape (S,), got (5, 1)", (x, members, offsets, torch.ones(5, 1))),
        Error("vtok::merge: expected weights of shape (S,)=(5,), got (4,)", (x, members, offsets, torch.ones(4))),
        Error(
            "vtok::merge: expected weights of dtype float32, got float16",
            (x, members, offsets, torch.ones(5, dtype=torch.float16)),
        ),
        Error(
            "vtok::merge: expected weights of dtype float64, got float32", (x.double(), members, offsets, torch.ones(5))
        ),
        Error(
            "vtok::merge: expected reduce to be mean, sum or max, got median",
            (x, members, offsets),
            {"reduce": "median"},
        ),
        Error(
            "vtok::merge: expected members in [-1, 5), got 2 values outside",
            (x, index([5, -2]), offsets),
            only_cpu=True,
        ),
        Error(
            "vtok::merge: expected offsets ascending from 0 to at most M=2, got offsets[2]=1",
            (x, members, index([0, 2, 1])),
            only_cpu=True,
        ),
    ]


def host(kernels, tokens, members, offsets, weights=None, *, reduce="mean"):
    groups = offsets.shape[0] - 1
    accumulator = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    values, weight = poisoned((groups, tokens.shape[1]), tokens.dtype), poisoned((groups,), accumulator)
    if groups:
        getattr(kernels, f"merge_{str(tokens.dtype)[6:]}")(
            to_numpy(tokens), *tokens.shape, tokens.shape[1], to_numpy(members), members.shape[0], to_numpy(offsets),
            groups, None if weights is None else to_numpy(weights), reduce == "mean", reduce == "max", values, weight,
        )  # fmt: skip
    return from_numpy(values, tokens.dtype), from_numpy(weight, accumulator)
