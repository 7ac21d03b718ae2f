"""motion_search: how far each patch is from the best block near it in the step before, and where that lies."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vtok.ops import _canonical, _check, _patch

SCHEMA = (
    "motion_search(Tensor frames, int[] patch, int radius, int tubelet=1, *, "
    'str metric="l1", str span="ends", float bias=0., bool pad=False) -> (Tensor motion, Tensor vectors)'
)
METRICS = ("l1", "mse", "l2")


def motion_search(
    frames: Tensor,
    patch: list[int],
    radius: int,
    tubelet: int = 1,
    *,
    metric: str = "l1",
    span: str = "ends",
    bias: float = 0.0,
    pad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Score each patch of pixels by its distance from the block of the step before that it is most like.

    ``patch_motion`` with motion compensation: an exact search of all blocks up to ``radius`` pixels away.

    Args:
        frames, patch, tubelet, metric, span, pad: as ``patch_motion`` takes them, shape (B, T, C, H, W), but for the
            metric "ssim".
        radius: >= 0. A candidate is the block at the patch's place moved by (dy, dx), both from -radius to radius, that
            lies wholly inside the frame; blocks that the frame's edge would cut are no candidates. A patch that ``pad``
            lets reach beyond the frame moves with its visible part. (0, 0) is always a candidate.
        bias: finite, >= 0, in the units of the metric and rounded to float32 (unless frames are float64). Another
            vector than (0, 0) is taken only where its distance plus the bias is below the distance at (0, 0).

    Returns:
        motion: float32 (float64 for float64 frames), shape (B, T', h, w), the distance at the vector, without the bias.
            Step 0 is +inf.
        vectors: int64, shape (B, T', h, w, 2), (dy, dx) in pixels from the patch to its block in the step before. Of
            equal distances (0, 0) goes first, then the smallest |dy| + |dx|, then dy, then dx; NaN is larger than any
            distance. Step 0 is (0, 0).

    Raises:
        RuntimeError: whatever ``patch_motion`` raises; the metric "ssim"; a radius or bias below 0.

    Equivalent to ``patch_motion`` for radius 0, bit for bit, with vectors of zeros; otherwise to the least of the
    distances from ``torch.roll(previous, (-dy, -dx), (-2, -1))`` over the candidates. The rule is full-search block
    matching with a zero-motion bias. ``patchify`` takes the vectors and gives the compensated residual.

    Moves the frames compared once and 20·B·T'·h·w bytes, and computes (2·radius + 1)² distances a patch. Class E. Not
    differentiable (``patchify`` at the vectors is). Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.motion_search(frames, patch, radius, tubelet, metric=metric, span=span, bias=bias, pad=pad)


def check(
    frames: Tensor, patch: list[int], radius: int, tubelet: int, metric: str, span: str, bias: float, pad: bool
) -> None:
    op = "motion_search"
    _check.expect(metric in METRICS, op, 'metric of "l1", "mse" or "l2"', f'"{metric}"')
    _patch.check(op, frames, patch, tubelet, metric, span, pad)
    _check.expect(radius >= 0, op, "radius >= 0", radius)
    _check.expect(math.isfinite(bias) and bias >= 0, op, "bias finite and >= 0", f"{bias:g}")


def candidates(ry: int, rx: int) -> Iterator[tuple[int, int]]:
    """Every vector but (0, 0), the preferred of equal ones first."""
    vectors = [(dy, dx) for dy in range(-ry, ry + 1) for dx in range(-rx, rx + 1) if dy or dx]
    yield from sorted(vectors, key=lambda v: (abs(v[0]) + abs(v[1]), v))


def rounded(bias: float, dtype: torch.dtype) -> float:
    return min(bias, torch.finfo(dtype).max)


def fits(at: Tensor, side: int, size: int, by: int) -> Tensor:
    """Whether the visible parts of patches that begin ``at`` stay inside when they move."""
    return (at + by >= 0) & ((at + side).clamp(max=size) + by <= size)


def reference(
    frames: Tensor,
    patch: list[int],
    radius: int,
    tubelet: int = 1,
    *,
    metric: str = "l1",
    span: str = "ends",
    bias: float = 0.0,
    pad: bool = False,
) -> tuple[Tensor, Tensor]:
    motion, vectors = fake(frames, patch, radius, tubelet, metric=metric, span=span, bias=bias, pad=pad)
    motion.fill_(math.inf)
    vectors.zero_()
    (ph, pw), (H, W), step = patch, frames.shape[-2:], _patch.steps(frames, tubelet)
    if step.shape[1] < 2:
        return motion, vectors
    x, r = _patch.compared(step[:, 1:], step[:, :-1], span)
    top = torch.arange(motion.shape[2], device=frames.device)[:, None] * ph
    left = torch.arange(motion.shape[3], device=frames.device) * pw
    still = _patch.distance(x, r, patch, metric)
    best, vy, vx = torch.full_like(still, math.nan), *torch.zeros(2, *still.shape, dtype=torch.int64, device=x.device)
    for dy, dx in candidates(min(radius, H - 1), min(radius, W - 1)):
        cost = _patch.distance(x, torch.nn.functional.pad(r, (-dx, dx, -dy, dy)), patch, metric)
        less = (cost < best) | (best.isnan() & ~cost.isnan())
        less = less & fits(top, ph, H, dy) & fits(left, pw, W, dx)
        best, vy, vx = torch.where(less, cost, best), vy.masked_fill(less, dy), vx.masked_fill(less, dx)
    moved = (best + rounded(bias, best.dtype) < still) | (still.isnan() & ~best.isnan())
    motion[:, 1:] = torch.where(moved, best, still)
    vectors[:, 1:] = torch.where(moved[..., None], torch.stack([vy, vx], -1), 0)
    return motion, vectors


def fake(
    frames: Tensor,
    patch: list[int],
    radius: int,
    tubelet: int = 1,
    *,
    metric: str = "l1",
    span: str = "ends",
    bias: float = 0.0,
    pad: bool = False,
) -> tuple[Tensor, Tensor]:
    check(frames, patch, radius, tubelet, metric, span, bias, pad)
    grid = _patch.grid(frames, patch, tubelet)
    motion = frames.new_empty(grid, dtype=_canonical.accumulator(frames.dtype))
    return motion, frames.new_empty((*grid, 2), dtype=torch.int64)
