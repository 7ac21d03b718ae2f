"""motion_search in Triton: a program takes one step of a few patches side by side and tries one vector after another,
what they are compared with being still in the L2 cache."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms
from vtok.triton_kernels._patch import dense_pixels, patch_distance, sizes


@triton.jit
def search_kernel(
    frames, motion, vectors, batch, frame, channel, row, steps, H, W, h, w, blocks, tubelet, ph, pw, FRAMES, count,
    ry, rx, bias_bits, METRIC: tl.constexpr, FLOAT: tl.constexpr, ACC: tl.constexpr, PATCHES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    id = tl.program_id(0).to(tl.int64)
    px = id % blocks * PATCHES + tl.arange(0, PATCHES)  # [PATCHES]
    py, t, b = id // blocks % h, id // blocks // h % steps, id // blocks // h // steps
    bias = tl.full((), bias_bits, tl.int64).to(tl.float64, bitcast=True).to(FLOAT)
    corner = frames + (b * batch + py * ph * row + px * pw)[:, None]  # [PATCHES, 1], of frame 0
    left = tl.where((px < w) & (t > 0), W - px * pw, 0)[:, None]
    x = corner + (t * tubelet + tubelet - FRAMES) * frame
    r = corner + tl.maximum(t - 1, 0) * tubelet * frame
    strides, rows = (channel, frame, row), H - py * ph
    still = tl.full((PATCHES,), 0, FLOAT)
    best, at, far = tl.full((PATCHES,), float("nan"), FLOAT), tl.full((PATCHES,), 0, tl.int32), ry + rx
    far += at  # |dy| + |dx| of the best
    top, bottom = py * ph, tl.minimum(py * ph + ph, H)
    begin, end = px * pw, tl.minimum(px * pw + pw, W)
    for i in range(tl.where(t > 0, (2 * ry + 1) * (2 * rx + 1), 0)):
        dy, dx = i // (2 * rx + 1) - ry, i % (2 * rx + 1) - rx
        fits = (begin + dx >= 0) & (end + dx <= W) & (top + dy >= 0) & (bottom + dy <= H)
        there = r + (tl.cast(dy, tl.int64) * row + dx)
        cost = patch_distance(x, there, strides, strides, tl.where(fits[:, None], left, 0), rows, pw, ph, FRAMES, count,
                              METRIC, FLOAT, ACC, PATCHES, COLUMNS)  # fmt: skip
        norm = tl.abs(dy) + tl.abs(dx)
        less = fits & ((cost < best) | ((best != best) & (cost == cost)) | ((cost == best) & (norm < far)))
        still, less = tl.where(norm + at * 0 == 0, cost, still), less & (norm + at * 0 > 0)
        best, at, far = tl.where(less, cost, best), tl.where(less, i, at), tl.where(less, norm, far)
    moved = (t > 0) & ((best + bias < still) | ((still != still) & (best == best)))
    vy, vx = (at // (2 * rx + 1) - ry).to(tl.int64), (at % (2 * rx + 1) - rx).to(tl.int64)
    place = ((b * steps + t) * h + py) * w + px
    tl.store(motion + place, tl.where(t == 0, float("inf"), tl.where(moved, best, still)), mask=px < w)
    tl.store(vectors + 2 * place, tl.where(moved, vy, 0), mask=px < w)
    tl.store(vectors + 2 * place + 1, tl.where(moved, vx, 0), mask=px < w)


def motion_search(
    frames: torch.Tensor,
    patch: list[int],
    radius: int,
    tubelet: int = 1,
    *,
    metric: str = "l1",
    span: str = "ends",
    bias: float = 0.0,
    pad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    room = _rooms.ROOMS["motion_search"]
    motion, vectors = room.fake(frames, patch, radius, tubelet, metric=metric, span=span, bias=bias, pad=pad)
    B, T, h, w = motion.shape
    if B * T:
        frames, (ph, pw), compared = dense_pixels(frames), patch, tubelet if span == "whole" else 1
        _, _, C, H, W = frames.shape
        constants = sizes(frames.dtype, pw, 128)
        blocks = triton.cdiv(w, constants["PATCHES"])
        bits = struct.unpack("<q", struct.pack("<d", room.rounded(bias, motion.dtype)))[0]
        search_kernel[(blocks * h * T * B,)](
            frames, motion, vectors, *frames.stride()[:4], T, H, W, h, w, blocks, tubelet, ph, pw, compared,
            C * compared * ph, min(radius, H - 1), min(radius, W - 1), bits, METRIC=metric, **constants, num_warps=2,
            enable_fp_fusion=False,
        )  # fmt: skip
    return motion, vectors
