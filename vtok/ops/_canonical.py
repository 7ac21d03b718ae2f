"""The one order in which scores are summed, so that decisions are bit-equal on every backend.

Products are rounded, then added. Of D values, value i belongs to lane i mod 64 of segment i div 512. A segment sums
the up to 8 values of each lane in ascending i, from +0; segments are added lane by lane, ascending; then lanes fold,
t[l] += t[l + h] for h = 32, 16, 8, 4, 2, 1. csrc/common/canonical.h, csrc/common/canonical.cuh and
triton_kernels/_canonical.py keep the same order.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

LANES = 64
SEGMENT = 512


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))


def total(x: Tensor) -> Tensor:
    """The sum over the last dimension, [..., D] -> [...], in canonical order."""
    D = x.shape[-1]
    segments = max(1, (D + SEGMENT - 1) // SEGMENT)
    x = torch.nn.functional.pad(x, (0, segments * SEGMENT - D))  # +0 changes no sum that starts at +0
    x = x.unflatten(-1, (segments, SEGMENT // LANES, LANES))
    lanes = reduce(torch.add, reduce(torch.add, x.unbind(-2)).unbind(-2))
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    return lanes[..., 0] + 0.0  # started from +0: no -0


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product over the last dimension of two widened tensors."""
    return total(a * b)


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded root. torch.sqrt of float64 may be off by an ulp (MKL), which rounding to float32 removes;
    the complex root goes through the C library, which rounds correctly."""
    if x.dtype == torch.float64:
        return torch.complex(x, torch.zeros_like(x)).sqrt().real
    return x.double().sqrt().to(x.dtype)


def cosine(dot: Tensor, norm_a: Tensor, norm_b: Tensor, eps: float) -> Tensor:
    """dot / max(√(norm_a·norm_b), eps) of squared norms; exactly 1 for identical rows."""
    return dot / sqrt(norm_a * norm_b).clamp(min=eps)
