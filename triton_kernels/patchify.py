"""patchify in Triton: a program takes a few rows and a block of their columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms
from vtok.triton_kernels._common import narrow


@triton.jit
def place(site, steps, high, wide, tubelet, ph, pw, stride_b, stride_t, stride_y, stride_x):
    """The offset of a site's first pixel, and its y and x."""
    y, x = site // wide % high * ph, site % wide * pw
    t, b = site // (wide * high) % steps * tubelet, site // (wide * high * steps)
    return b * stride_b + t * stride_t + y * stride_y + x * stride_x, y, x


@triton.jit
def channel_values(values, c, ACC: tl.constexpr):
    """values[c] of a tuple of exact float32 parts, three to a float64 one."""
    PARTS: tl.constexpr = 3 if ACC == tl.float64 else 1
    chosen = tl.full(c.shape, 0, ACC)
    for i in tl.static_range(len(values) // PARTS):
        value = tl.full(c.shape, 0, ACC)
        for part in tl.static_range(PARTS):
            value += values[i * PARTS + part]
        chosen = value if len(values) == PARTS else tl.where(c == i, value, chosen)
    return chosen


@triton.jit
def patchify_kernel(
    frames, index, reference, vectors, out, scales, shifts, count, sites, steps, high, wide, C, H, W, tubelet, ph, pw,
    stride_b, stride_t, stride_c, stride_y, stride_x,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    width = C * tubelet * ph * pw
    if CHANNELS_LAST:
        c, pixel = j % C, j // C
        t = pixel // (ph * pw)
    else:
        pixel = j
        c, t = j // (ph * pw * tubelet), j // (ph * pw) % tubelet
    y, x = pixel // pw % ph, pixel % pw
    step = c.to(tl.int64) * stride_c + t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    scale, shift = channel_values(scales, c, ACC)[None, :], channel_values(shifts, c, ACC)[None, :]

    site = tl.load(index + k, mask=k < count, other=-1)
    valid = (site >= 0) & (site < sites)
    first, top, left = place(
        tl.where(valid, site, 0), steps, high, wide, tubelet, ph, pw, stride_b, stride_t, stride_y, stride_x
    )
    inside = valid[:, None] & (top[:, None] + y[None, :] < H) & (left[:, None] + x[None, :] < W) & (j < width)[None, :]
    own = tl.load(frames + first[:, None] + step[None, :], mask=inside, other=0).to(ACC)
    value = tl.where(inside, own * scale - shift, 0)
    if reference is not None:
        other = tl.load(reference + k, mask=k < count, other=-1)
        used = valid & (other >= 0) & (other < sites)
        first, top, left = place(
            tl.where(used, other, 0), steps, high, wide, tubelet, ph, pw, stride_b, stride_t, stride_y, stride_x
        )
        if vectors is not None:  # clamped, so that the farthest are outside and none overflows
            dy = tl.load(vectors + 2 * k, mask=k < count, other=0)
            dx = tl.load(vectors + 2 * k + 1, mask=k < count, other=0)
            dy = tl.minimum(tl.maximum(dy, -(H + ph)), H + ph)
            dx = tl.minimum(tl.maximum(dx, -(W + pw)), W + pw)
            first, top, left = first + dy * stride_y + dx * stride_x, top + dy, left + dx
        row, column = top[:, None] + y[None, :], left[:, None] + x[None, :]
        seen = used[:, None] & (row >= 0) & (row < H) & (column >= 0) & (column < W) & (j < width)[None, :]
        subtracted = tl.load(frames + first[:, None] + step[None, :], mask=seen, other=0).to(ACC)
        alone = tl.where(seen, 0 - (subtracted * scale - shift), value)
        value = tl.where(inside & seen, (own - subtracted) * scale, tl.where(inside, value, alone))
    mask = (k < count)[:, None] & (j < width)[None, :]
    tl.store(out + k[:, None] * width + j[None, :], narrow(value, out.dtype.element_ty), mask=mask)


def parts(values: list[float], double: bool) -> tuple[float, ...]:
    """The values rounded to float32, as what a launch passes is; for float64 three parts each, whose sum is exact."""
    rounded = torch.tensor(values, dtype=torch.float64)
    found = []
    for _ in range(3 if double else 1):
        found.append(rounded.float())
        rounded = rounded - found[-1]
    return tuple(torch.stack(found, 1).flatten().tolist())


def patchify(
    frames: torch.Tensor,
    index: torch.Tensor,
    patch: list[int],
    tubelet: int = 1,
    reference_index: torch.Tensor | None = None,
    vectors: torch.Tensor | None = None,
    *,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    dtype: torch.dtype | None = None,
    order: str = "cthw",
    pad: bool = False,
) -> torch.Tensor:
    room = _rooms.ROOMS["patchify"]
    room.check(frames, index, patch, tubelet, reference_index, vectors, mean, std, dtype, order, pad)
    B, steps, high, wide = room.grid_of(frames, patch, tubelet)
    _, _, C, H, W = frames.shape
    width = C * tubelet * patch[0] * patch[1]
    out = frames.new_empty(index.shape[0], width, dtype=room.output_dtype(frames, dtype))
    sites = B * steps * high * wide
    if sites == 0:
        return out.zero_()
    if out.numel():
        double = frames.dtype == torch.float64
        scales, shifts = (parts(v, double) for v in room.affine(frames.dtype == torch.uint8, mean, std))
        BLOCK_D = min(triton.next_power_of_2(width), 1024)
        patchify_kernel[triton.cdiv(index.shape[0], 2), triton.cdiv(width, BLOCK_D)](
            frames, index.contiguous(), None if reference_index is None else reference_index.contiguous(),
            None if vectors is None else vectors.contiguous(), out, scales, shifts, index.shape[0], sites, steps, high,
            wide, C, H, W, tubelet, *patch, *frames.stride(), CHANNELS_LAST=order == "thwc",
            ACC=tl.float64 if double else tl.float32, BLOCK_K=2, BLOCK_D=BLOCK_D, enable_fp_fusion=False,
        )  # fmt: skip
    return out
