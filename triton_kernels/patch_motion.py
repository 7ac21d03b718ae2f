"""patch_motion in Triton: a program takes one step of a few patches side by side and the step before, still in the L2
cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _canonical, _patch, _rooms
from vtok.triton_kernels._patch import dense_pixels, patch_distance, sizes


@triton.jit
def motion_kernel(
    frames, scores, batch, frame, channel, row, steps, H, W, h, w, blocks, tubelet, ph, pw, FRAMES, count,
    METRIC: tl.constexpr, FLOAT: tl.constexpr, ACC: tl.constexpr, PATCHES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    id = tl.program_id(0).to(tl.int64)
    px = id % blocks * PATCHES + tl.arange(0, PATCHES)  # [PATCHES]
    py, t, b = id // blocks % h, id // blocks // h % steps, id // blocks // h // steps
    corner = frames + (b * batch + py * ph * row + px * pw)[:, None]  # [PATCHES, 1], of frame 0
    left = tl.where((px < w) & (t > 0), W - px * pw, 0)[:, None]
    x = corner + (t * tubelet + tubelet - FRAMES) * frame
    r = corner + tl.maximum(t - 1, 0) * tubelet * frame
    strides = (channel, frame, row)
    score = patch_distance(x, r, strides, strides, left, H - py * ph, pw, ph, FRAMES, count, METRIC, FLOAT, ACC,
                           PATCHES, COLUMNS)  # fmt: skip
    score = tl.where(t == 0, float("inf"), score)
    tl.store(scores + ((b * steps + t) * h + py) * w + px, score, mask=px < w)


def patch_motion(
    frames: torch.Tensor,
    patch: list[int],
    tubelet: int = 1,
    *,
    metric: str = "l1",
    span: str = "ends",
    pad: bool = False,
) -> torch.Tensor:
    _rooms.ROOMS["patch_motion"].check(frames, patch, tubelet, metric, span, pad)
    B, T, h, w = _patch.grid(frames, patch, tubelet)
    scores = frames.new_empty(B, T, h, w, dtype=_canonical.accumulator(frames.dtype))
    if B * T:
        frames, (ph, pw), compared = dense_pixels(frames), patch, tubelet if span == "whole" else 1
        constants = sizes(frames.dtype, pw, 128 if frames.dtype == torch.float64 else 256)
        blocks = triton.cdiv(w, constants["PATCHES"])
        motion_kernel[(blocks * h * T * B,)](
            frames, scores, *frames.stride()[:4], T, *frames.shape[3:], h, w, blocks, tubelet, ph, pw, compared,
            frames.shape[2] * compared * ph, METRIC=metric, **constants, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return scores
