"""patch_motion: how far each patch moved since the step before."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtok.ops import _canonical, _patch

SCHEMA = (
    "patch_motion(Tensor frames, int[] patch, int tubelet=1, *, "
    'str metric="l1", str span="ends", bool pad=False) -> Tensor'
)


def patch_motion(
    frames: Tensor, patch: list[int], tubelet: int = 1, *, metric: str = "l1", span: str = "ends", pad: bool = False
) -> Tensor:
    """Score each patch of pixels by its distance from the same patch one step earlier.

    Args:
        frames: uint8, float32, float16, bfloat16 or float64, shape (B, T, C, H, W) with C, H and W >= 1: B videos. Any
            strides; rows of pixels that are not dense are copied first. uint8 counts as the integers 0 to 255.
        patch: (ph, pw), a patch's height and width in pixels, at most (H, W).
        tubelet: frames of a step, >= 1; T is divisible by it.
        metric: the distance of P values x from their reference r. "l1", Σ|x - r| / P. "mse", Σ(x - r)² / P. "l2",
            √Σ(x - r)². "ssim", 1 - SSIM of one window over all P values, clamped to [0, 2]: biased moments,
            L = max(max x - min x, max r - min r, 1), constants (0.01 L)² and (0.03 L)². On pixels in [-1, 1] it takes
            sensor noise in flat patches for motion (σ = 0.01 scores about 0.1) and hardly sees it on texture (2e-4);
            the other metrics treat both alike.
        span: "ends" compares the last frame of a step with the first of the step before (RLT's and DTD's rule), so
            P = C·ph·pw; "whole" compares frame j with frame j, all tubelet of them (GRT's tubes), P = C·tubelet·ph·pw.
        pad: let H and W be no multiples of the patch. Pixels outside are 0 in both, unchanged; P stays.

    Returns:
        float32 (float64 for float64 frames), shape (B, T', h, w), T' = T / tubelet, h = ⌈H / ph⌉, w = ⌈W / pw⌉. Step 0
        is +inf. NaN in a patch makes its scores NaN.

    Raises:
        RuntimeError: wrong rank, dtype, patch, tubelet, metric or span; sizes that do not divide; "ssim" of uint8 with
            more than 2^24 values in a patch.

    Equivalent, for "l1" and tubelet 1, up to the order of the sums, to ``torch.nn.functional.avg_pool2d((x[1:] -
    x[:-1]).abs().mean(1), patch)`` of one video ``x`` = (T, C, H, W) in float32. The rules are RLT's, DTD's and GRT's.
    The order of the sums is fixed (vtok/ops/_patch.py).

    Moves the frames compared once, B·T·C·H·W·itemsize bytes, and 4·B·T'·h·w. Class E. Differentiable in float
    ``frames``, with gradient 0 at an "l2" of 0. Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.patch_motion(frames, patch, tubelet, metric=metric, span=span, pad=pad)


def check(frames: Tensor, patch: list[int], tubelet: int, metric: str, span: str, pad: bool) -> None:
    _patch.check("patch_motion", frames, patch, tubelet, metric, span, pad)


def scores(frames: Tensor, patch: list[int], tubelet: int, metric: str, span: str) -> Tensor:
    """Of all steps but the first."""
    step = _patch.steps(frames, tubelet)
    return _patch.distance(*_patch.compared(step[:, 1:], step[:, :-1], span), patch, metric)


def reference(
    frames: Tensor, patch: list[int], tubelet: int = 1, *, metric: str = "l1", span: str = "ends", pad: bool = False
) -> Tensor:
    check(frames, patch, tubelet, metric, span, pad)
    B, T, h, w = _patch.grid(frames, patch, tubelet)
    first = frames.new_full((B, min(T, 1), h, w), math.inf, dtype=_canonical.accumulator(frames.dtype))
    return torch.cat([first, scores(frames, patch, tubelet, metric, span)], 1) if T > 1 else first


def fake(
    frames: Tensor, patch: list[int], tubelet: int = 1, *, metric: str = "l1", span: str = "ends", pad: bool = False
) -> Tensor:
    check(frames, patch, tubelet, metric, span, pad)
    return frames.new_empty(_patch.grid(frames, patch, tubelet), dtype=_canonical.accumulator(frames.dtype))


def setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    frames, *ctx.sizes = inputs
    ctx.save_for_backward(frames, output)
    ctx.metric, ctx.span = keyword_only_inputs["metric"], keyword_only_inputs["span"]


def backward(ctx, grad: Tensor):
    """Through the reference, computed again; an "l2" through its square, whose root has no slope at 0."""
    frames, score = ctx.saved_tensors
    grad, score = grad[:, 1:], score[:, 1:]
    if frames.shape[1] <= ctx.sizes[1]:
        return torch.zeros_like(frames), None, None
    metric = ctx.metric
    if metric == "l2":
        count = frames.shape[2] * math.prod(ctx.sizes[0]) * (ctx.sizes[1] if ctx.span == "whole" else 1)
        metric, grad = "mse", torch.where(score > 0, grad * count / (2 * score), 0)
    patch, tubelet = ctx.sizes
    vjp = torch.func.vjp(lambda x: scores(x, patch, tubelet, metric, ctx.span), frames)[1]
    return vjp(grad)[0], None, None
