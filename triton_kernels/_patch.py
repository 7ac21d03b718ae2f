"""The distances of patches (vtok/ops/_patch.py) in Triton: tiles of [PATCHES, COLUMNS], down the rows of pixels. Launch
kernels that use it with enable_fp_fusion=False: products are rounded before they are added."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.triton_kernels._canonical import div_rn, sqrt_rn


@triton.jit
def down_rows(
    x, r, x_strides, r_strides, inside, rows, ph, FRAMES, count, mean_x, mean_r,
    RULE: tl.constexpr, ACC: tl.constexpr, PATCHES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Five sums and four most values of each column of pixels, as far as ``RULE`` needs them. x and r point to the
    first pixels [PATCHES, COLUMNS]; strides are (channel, frame, row)."""
    VALUE: tl.constexpr = tl.int32 if ACC == tl.int64 else ACC
    zero = tl.full((PATCHES, COLUMNS), 0, ACC)
    a, b, aa, bb, ab = zero, zero, zero, zero, zero
    least = tl.full((PATCHES, COLUMNS), -256 if ACC == tl.int64 else float("-inf"), VALUE)
    most_x, most_minus_x, most_r, most_minus_r = least, least, least, least
    for i in range(count):
        y = i % ph
        channel, frame = (i // ph // FRAMES).to(tl.int64), i // ph % FRAMES
        mask = inside & (y < rows)
        u = tl.load(x + channel * x_strides[0] + frame * x_strides[1] + y * x_strides[2], mask=mask, other=0).to(VALUE)
        v = tl.load(r + channel * r_strides[0] + frame * r_strides[1] + y * r_strides[2], mask=mask, other=0).to(VALUE)
        if RULE == "l1":
            a += tl.abs(u - v).to(ACC)
        elif RULE == "square":
            a += ((u - v) * (u - v)).to(ACC)
        elif RULE == "centred":
            u -= mean_x
            v -= mean_r
            aa += u * u
            bb += v * v
            ab += u * v
        else:
            a += u.to(ACC)
            b += v.to(ACC)
            most_x, most_minus_x = tl.where(u > most_x, u, most_x), tl.where(-u > most_minus_x, -u, most_minus_x)
            most_r, most_minus_r = tl.where(v > most_r, v, most_r), tl.where(-v > most_minus_r, -v, most_minus_r)
            if RULE == "moments":
                aa += (u * u).to(ACC)
                bb += (v * v).to(ACC)
                ab += (u * v).to(ACC)
    return a, b, aa, bb, ab, most_x, most_minus_x, most_r, most_minus_r


@triton.jit
def add_columns(total, columns, left, ACC: tl.constexpr, COLUMNS: tl.constexpr):
    """Left to right, the first ``left`` columns of a tile."""
    lane = tl.arange(0, COLUMNS)[None, :]
    if ACC == tl.int64:
        total += tl.sum(tl.where(lane < left, columns, 0), 1)
    else:
        for k in range(tl.minimum(left, COLUMNS)):
            total += tl.sum(tl.where(lane == k, columns, 0), 1)  # of one value
    return total


@triton.jit
def most_of(total, columns, left, COLUMNS: tl.constexpr):
    lane = tl.arange(0, COLUMNS)[None, :]
    least = -256 if columns.dtype == tl.int32 else float("-inf")
    return tl.maximum(total, tl.max(tl.where(lane < left, columns, least), 1))


@triton.jit
def ssim_distance(mx, mr, vx, vr, c, spread):
    """1 - SSIM in [0, 2]; NaN stays NaN."""
    FLOAT: tl.constexpr = mx.dtype
    L = tl.where(spread < 1, tl.full((), 1, FLOAT), spread)
    l1, l2 = tl.full((), 0.01, FLOAT) * L, tl.full((), 0.03, FLOAT) * L
    c1, c2 = l1 * l1, l2 * l2
    product = (mx * mx + mr * mr + c1) * (vx + vr + c2)
    product = tl.where(product < tl.full((), 1e-12, FLOAT), tl.full((), 1e-12, FLOAT), product)
    d = 1 - div_rn((2 * mx * mr + c1) * (2 * c + c2), product)
    return tl.where(d < 0, tl.full((), 0, FLOAT), tl.where(d > 2, tl.full((), 2, FLOAT), d))


@triton.jit
def patch_distance(
    x, r, x_strides, r_strides, left, rows, pw, ph, FRAMES, count, METRIC: tl.constexpr, FLOAT: tl.constexpr,
    ACC: tl.constexpr, PATCHES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[PATCHES]: the score of each patch from the pointers to its corners, [PATCHES, 1]; ``left`` is how many columns
    of pixels there are from the corner on, ``count`` the rows of pixels of a patch in all its channels and frames."""
    SSIM: tl.constexpr = "moments" if ACC == tl.int64 else "levels"
    RULE: tl.constexpr = SSIM if METRIC == "ssim" else METRIC if METRIC == "l1" else "square"
    lane = tl.arange(0, COLUMNS)[None, :]
    rows += tl.full((PATCHES, 1), 0, tl.int64)  # in the interpreter a scalar's comparison is no boolean
    nothing = tl.full((PATCHES,), 0, ACC)
    a, b, aa, bb, ab = nothing, nothing, nothing, nothing, nothing
    least = tl.full((PATCHES,), -256 if ACC == tl.int64 else float("-inf"), tl.int32 if ACC == tl.int64 else ACC)
    most_x, most_minus_x, most_r, most_minus_r = least, least, least, least
    for k in range(0, pw, COLUMNS):
        inside = (k + lane < left) & (k + lane < pw)
        s = down_rows(x + k + lane, r + k + lane, x_strides, r_strides, inside, rows, ph, FRAMES, count, 0, 0, RULE,
                      ACC, PATCHES, COLUMNS)  # fmt: skip
        if METRIC == "ssim":
            most_x, most_minus_x = most_of(most_x, s[5], pw - k, COLUMNS), most_of(most_minus_x, s[6], pw - k, COLUMNS)
            most_r, most_minus_r = most_of(most_r, s[7], pw - k, COLUMNS), most_of(most_minus_r, s[8], pw - k, COLUMNS)
            b = add_columns(b, s[1], pw - k, ACC, COLUMNS)
        a = add_columns(a, s[0], pw - k, ACC, COLUMNS)
        if RULE == "moments":
            aa = add_columns(aa, s[2], pw - k, ACC, COLUMNS)
            bb = add_columns(bb, s[3], pw - k, ACC, COLUMNS)
            ab = add_columns(ab, s[4], pw - k, ACC, COLUMNS)
    P = tl.cast(count, tl.int64) * pw
    p = P.to(FLOAT) + tl.full((PATCHES,), 0, FLOAT)
    if METRIC == "l2":
        return sqrt_rn(a.to(FLOAT))
    elif METRIC != "ssim":
        return div_rn(a.to(FLOAT), p)
    else:
        mx, mr = div_rn(a.to(FLOAT), p), div_rn(b.to(FLOAT), p)
        spread = tl.maximum(most_x + most_minus_x, most_r + most_minus_r).to(FLOAT)
        if ACC == tl.int64:
            vx, vr = div_rn((P * aa - a * a).to(FLOAT), p * p), div_rn((P * bb - b * b).to(FLOAT), p * p)
            c = div_rn((P * ab - a * b).to(FLOAT), p * p)
        else:
            for k in range(0, pw, COLUMNS):
                inside = (k + lane < left) & (k + lane < pw)
                s = down_rows(x + k + lane, r + k + lane, x_strides, r_strides, inside, rows, ph, FRAMES, count,
                              mx[:, None], mr[:, None], "centred", ACC, PATCHES, COLUMNS)  # fmt: skip
                aa = add_columns(aa, s[2], pw - k, ACC, COLUMNS)
                bb = add_columns(bb, s[3], pw - k, ACC, COLUMNS)
                ab = add_columns(ab, s[4], pw - k, ACC, COLUMNS)
            vx, vr, c = div_rn(aa, p), div_rn(bb, p), div_rn(ab, p)
        return ssim_distance(mx, mr, vx, vr, c, spread)


def dense_pixels(frames: torch.Tensor) -> torch.Tensor:
    return frames if frames.stride(4) == 1 or frames.shape[4] == 1 else frames.contiguous()


def sizes(dtype: torch.dtype, pw: int, tile: int) -> dict:
    """The constants of a launch: a tile of so many pixels, as many as spill no registers."""
    COLUMNS = min(triton.next_power_of_2(pw), 128)
    FLOAT = tl.float64 if dtype == torch.float64 else tl.float32
    ACC = tl.int64 if dtype == torch.uint8 else FLOAT
    return {"FLOAT": FLOAT, "ACC": ACC, "PATCHES": tile // COLUMNS, "COLUMNS": COLUMNS}
