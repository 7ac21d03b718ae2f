"""What the test rooms of patch_motion and motion_gate share."""

from __future__ import annotations

import math

import torch

from rooms import FLOATS, generator, randn

PIXELS = (torch.uint8, *FLOATS)


def video(shape: tuple[int, ...], dtype: torch.dtype, *seed) -> torch.Tensor:
    """Frames that drift slowly, with a quarter of the pixels standing still."""
    still, moving = randn((shape[0], 1, *shape[2:]), torch.float64, "still", *seed), randn(shape, torch.float64, *seed)
    x = 0.3 * torch.where(still > 0.7, still, still + 0.2 * moving.cumsum(1))
    return (x * 127 + 128).clamp(0, 255).to(torch.uint8) if dtype == torch.uint8 else x.to(dtype)


def bytes_of(shape: tuple[int, ...], *seed) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator(shape, *seed), dtype=torch.uint8)


def planted() -> torch.Tensor:
    """Nine patches of 4 × 4: NaN, infinities, values whose squares overflow or vanish, static, -0, flat, a cut."""
    x = randn((1, 4, 1, 4, 36), torch.float32, "planted")
    patch = [x[..., 4 * i : 4 * i + 4] for i in range(9)]
    patch[0][0, 1, 0, 2, 3], patch[1][0, 2, 0, 0, 0], patch[2][0, 1:3, 0, 1, 1] = math.nan, math.inf, -math.inf
    patch[3][0, 1], patch[4][0, 1:] = 3e38, 1e-30
    patch[5][:] = patch[5][:, :1]
    patch[6][0, ::2], patch[6][0, 1::2] = 0.0, -0.0
    patch[7][:] = 0.25
    patch[8][0, 2:] += 1e4
    return x
