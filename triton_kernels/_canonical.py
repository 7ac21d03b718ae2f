"""The canonical order of sums (vtok/ops/_canonical.py) in Triton: tiles of [rows, 64 lanes]. Launch kernels that use it
with enable_fp_fusion=False: products are rounded before they are added."""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(64)
SEGMENT = tl.constexpr(512)
STEPS = tl.constexpr(8)


@triton.jit
def fold(lanes, ROWS: tl.constexpr):
    """[ROWS, 64] -> [ROWS]: t[l] += t[l + h] for h = 32, 16, 8, 4, 2, 1."""
    for i in tl.static_range(6):
        low, high = tl.split(tl.permute(tl.reshape(lanes, (ROWS, 2, 32 >> i)), (0, 2, 1)))
        lanes = low + high
    return tl.reshape(lanes, (ROWS,))


@triton.jit
def sqrt_rn(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def div_rn(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def cosine(dot, norm_a, norm_b, eps):
    """dot / max(√(norm_a·norm_b), eps) of squared norms; NaN stays NaN."""
    root = sqrt_rn(norm_a * norm_b)
    return div_rn(dot, tl.where(root < eps, eps, root))
