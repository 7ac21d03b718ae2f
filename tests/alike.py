"""Rows to compare with one another: whole numbers whose cosines tie, and what is awkward among them."""

from __future__ import annotations

import math

import torch

from rooms import generator


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


RAGGED = bounds(11, 0, 1, 2, 3, 40, 8)  # of 65 rows, of which some are beyond the last segment


def whole_numbers(rows: int, D: int) -> torch.Tensor:
    """Small integers: every sum is exact, and many cosines tie."""
    return torch.randint(-2, 3, (rows, D), generator=generator("whole", rows, D)).float()


def planted() -> torch.Tensor:
    """NaN, infinity, zeros, repeated, opposite and scaled rows."""
    x = whole_numbers(65, 7)
    x[3, 2], x[5], x[17, 0] = math.nan, 0, math.inf
    x[9], x[20], x[22] = x[0], -x[21], 4 * x[21]
    x[15], x[16] = x[14], -0.0 * x[14]
    x[57:] = math.nan  # a segment of nothing else
    return x
