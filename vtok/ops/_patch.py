"""How patches are compared: the arithmetic of patch_motion and motion_gate, bit-equal on every backend.

A patch has P = channels x frames x ph x pw values. Sums of uint8 pixels are exact integers, rounded once at the end.
Floats are widened to float32; a column of pixels adds its values from +0 over (channel, frame, y), ascending, products
rounded first; then the columns of the patch are added left to right. csrc/common/patch*.h, csrc/common/patch.cuh and
triton_kernels/_patch.py keep the same order.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from vtok.ops import _check
from vtok.ops._canonical import accumulator, sqrt

METRICS = ("l1", "mse", "l2", "ssim")
MOST = 2**24  # values of a patch of integers under ssim: their moments fit int64


def expect_frames(op: str, name: str, frames: Tensor, shape: str) -> None:
    _check.expect_dim(op, name, frames, 5, shape)
    dtypes = "uint8, float32, float16, bfloat16 or float64"
    got = _check.dtype_text(frames.dtype)
    _check.expect(frames.dtype in (torch.uint8, *_check.FLOATS), op, f"{name} of dtype {dtypes}", got)


def check(op: str, frames: Tensor, patch: list[int], tubelet: int, metric: str, span: str, pad: bool) -> None:
    expect_frames(op, "frames", frames, "(B, T, C, H, W)")
    _, T, C, H, W = frames.shape
    _check.expect(C >= 1 and H >= 1 and W >= 1, op, "frames with C, H and W >= 1", _check.shape_text(frames))
    _check.expect(len(patch) == 2, op, "patch of 2 sizes (ph, pw)", len(patch))
    ph, pw = patch
    got = f"({ph}, {pw})"
    _check.expect(min(patch) >= 1 and ph <= H and pw <= W, op, f"patch from (1, 1) to (H, W)=({H}, {W})", got)
    _check.expect(
        pad or (H % ph == 0 and W % pw == 0), op, f"(H, W) divisible by patch {got} without pad", f"({H}, {W})"
    )
    _check.expect(tubelet >= 1, op, "tubelet >= 1", tubelet)
    _check.expect(T % tubelet == 0, op, f"T divisible by tubelet={tubelet}", T)
    names = ", ".join(f'"{name}"' for name in METRICS[:-1])
    _check.expect(metric in METRICS, op, f'metric of {names} or "ssim"', f'"{metric}"')
    _check.expect(span in ("ends", "whole"), op, 'span of "ends" or "whole"', f'"{span}"')
    if metric == "ssim" and frames.dtype == torch.uint8:
        values = C * ph * pw * (tubelet if span == "whole" else 1)
        _check.expect(values <= MOST, op, f"patches of at most {MOST} values for ssim of uint8", values)


def grid(frames: Tensor, patch: list[int], tubelet: int) -> tuple[int, int, int, int]:
    """(B, T', h, w)."""
    B, T, _, H, W = frames.shape
    ph, pw = patch
    return B, T // tubelet, (H + ph - 1) // ph, (W + pw - 1) // pw


def steps(frames: Tensor, tubelet: int) -> Tensor:
    """[B, T, C, H, W] -> [B, T', C, tubelet, H, W]."""
    return frames.unflatten(1, (frames.shape[1] // tubelet, tubelet)).transpose(2, 3)


def compared(x: Tensor, r: Tensor, span: str) -> tuple[Tensor, Tensor]:
    """What is compared of steps [..., tubelet, H, W] and their references."""
    return (x, r) if span == "whole" else (x[..., -1:, :, :], r[..., :1, :, :])


def columns(x: Tensor, patch: list[int]) -> Tensor:
    """[..., C, frames, H, W] -> [C·frames·ph, ..., h, w, pw]: a patch's values by column, in the order of the sums."""
    ph, pw = patch
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % pw, 0, -x.shape[-2] % ph))
    x = x.unflatten(-1, (x.shape[-1] // pw, pw)).unflatten(
        -3, (x.shape[-2] // ph, ph)
    )  # [..., C, frames, h, ph, w, pw]
    return x.movedim((-6, -5, -3), (0, 1, 2)).flatten(0, 2)


def total(values: Tensor) -> Tensor:
    """[rows, ..., pw] -> [...]."""
    if not values.is_floating_point():
        return values.sum((0, -1))
    column = reduce(torch.add, values.unbind(0), torch.zeros_like(values[0]))
    return reduce(torch.add, column.unbind(-1), torch.zeros_like(column[..., 0]))


def divide(total: Tensor, by: int) -> Tensor:
    return total / torch.full_like(total, by)  # by a tensor: a number may become its reciprocal


def distance(x: Tensor, r: Tensor, patch: list[int], metric: str) -> Tensor:
    """Steps [..., C, frames, H, W] against their references: [..., h, w] in the accumulator's dtype."""
    dtype = accumulator(x.dtype)
    x, r = (columns(v.to(dtype if v.is_floating_point() else torch.int32), patch) for v in (x, r))
    count = x.shape[0] * x.shape[-1]
    if metric == "ssim":
        return ssim(x, r, count, dtype)
    difference = x - r
    sums = total(difference.abs() if metric == "l1" else difference * difference).to(dtype)
    return sqrt(sums) if metric == "l2" else divide(sums, count)


def ssim(x: Tensor, r: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """1 - SSIM of one window a patch, clamped to [0, 2]."""
    sx, sr = total(x), total(r)
    mx, mr = (divide(s.to(dtype), count) for s in (sx, sr))
    if x.is_floating_point():
        a, b = x - mx[..., None], r - mr[..., None]
        vx, vr, c = (divide(total(v), count) for v in (a * a, b * b, a * b))
    else:
        moments = (count * total(x * x) - sx * sx, count * total(r * r) - sr * sr, count * total(x * r) - sx * sr)
        square = torch.full_like(mx, count) * torch.full_like(mx, count)
        vx, vr, c = (moment.to(dtype) / square for moment in moments)
    spread = [(v.amax((0, -1)) - v.amin((0, -1))).to(dtype) for v in (x, r)]
    L = torch.maximum(*spread).clamp(min=1)
    c1, c2 = 0.01 * L * (0.01 * L), 0.03 * L * (0.03 * L)
    likeness = (2 * mx * mr + c1) * (2 * c + c2) / ((mx * mx + mr * mr + c1) * (vx + vr + c2)).clamp(min=1e-12)
    return (1 - likeness).clamp(0, 2)


def pixels(values: Tensor, patch: list[int], H: int, W: int) -> Tensor:
    """[..., h, w] -> [..., H, W]: each patch's value at its pixels."""
    ph, pw = patch
    return values.repeat_interleave(ph, -2)[..., :H, :].repeat_interleave(pw, -1)[..., :W]
