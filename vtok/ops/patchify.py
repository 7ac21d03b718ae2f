"""patchify: chosen patches of frames as rows, normalised and cast."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vtok.ops import _check
from vtok.ops._canonical import accumulator

SCHEMA = (
    "patchify(Tensor frames, Tensor index, SymInt[] patch, SymInt tubelet=1, Tensor? reference_index=None, "
    "Tensor? vectors=None, *, float[]? mean=None, float[]? std=None, ScalarType? dtype=None, "
    'str order="cthw", bool pad=False) -> Tensor'
)
CHANNELS = 128  # the most with a mean or std: they travel with the launch


def patchify(
    frames: Tensor,
    index: Tensor,
    patch: Sequence[int],
    tubelet: int = 1,
    reference_index: Tensor | None = None,
    vectors: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    order: str = "cthw",
    pad: bool = False,
) -> Tensor:
    """Gather the chosen patches into rows that a patch embedding takes, normalised and cast on the way.

    Args:
        frames: uint8, float32, float16, bfloat16 or float64, shape (B, T, C, H, W), any strides.
        index: int64, shape (K,), sites in [-1, S), in any order, repeats allowed. The grid of B, T' = T / tubelet,
            h = H / ph and w = W / pw has S = B·T'·h·w sites, numbered in that order. -1 makes a row of zeros.
        patch: height and width (ph, pw) of a patch in pixels.
        tubelet: frames of a patch; divides T.
        reference_index: int64, shape (K,), sites in [-1, S): the row is what differs from the patch there (a residual
            token). -1 means no reference.
        vectors: int64, shape (K, 2), (dy, dx) in pixels: the reference is the block so far from that patch, in its
            step, as ``motion_search`` returns it (a compensated residual). It may reach beyond the frame.
        mean, std: one number per channel, in [0, 1] units for uint8 frames. None: 0 and 1.
        dtype: float32, float16 or bfloat16, float64 for float64 frames; None is float32 for uint8 frames, else theirs.
        order: of the values in a row, "cthw" (channel, frame, y, x), as in the flattened weight of Conv2d (tubelet 1)
            and Conv3d patch embeddings; or "thwc" (frame, y, x, channel).
        pad: let patches reach beyond the right and lower edge: h and w are rounded up, and pixels outside come out
            as 0, the mean colour. Without it H and W are multiples of the patch.

    Returns:
        Tensor of ``dtype``, shape (K, C·tubelet·ph·pw).

    Raises:
        RuntimeError: wrong rank, shape, dtype or device, sizes that do not divide, a mean that is not finite, a std
            that is not finite and positive, more than 128 channels with either; on the CPU also an index outside
            [-1, S). On other devices such an index counts as -1, for looking would cost a sync.

    A value is round(x·scale) - shift in float32 (float64 for float64 frames), never contracted, then rounded to nearest
    even in ``dtype``, where scale = 1 / (255·std) for uint8 frames and 1 / std for others, and shift = mean / std,
    both taken in float64 and rounded once. Before the last rounding it is within 2^-24·(2·|x·scale| + |shift| + |y|) of
    the exact y = x·scale - shift. With a reference r it is (x - r)·scale: the mean cancels, and the difference of uint8
    pixels is exact. Where the reference's pixel lies outside the frame the value is that of x alone.

    Equivalent, for every site in order, one frame a patch, no reference and order "cthw", to
    ``torch.nn.functional.unfold((x - mean) / std, patch, stride=patch).mT.flatten(0, 1)`` of (B·T, C, H, W) frames; so
    ``patchify(...) @ conv.weight.flatten(1).T`` is the convolution.

    Moves K·C·tubelet·ph·pw·(itemsize in + itemsize out) + 8·K bytes. Class E. Differentiable in float ``frames``
    (backward is ``merge(reduce="sum")`` over the sites, with vectors over the pixels). Capturable in a CUDA graph;
    never syncs.
    """
    return torch.ops.vtok.patchify(
        frames, index, patch, tubelet, reference_index, vectors, mean=mean, std=std, dtype=dtype, order=order, pad=pad
    )


def check(frames, index, patch, tubelet, reference_index, vectors, mean, std, dtype, order, pad) -> None:
    def expect(ok, expected, got):
        _check.expect(ok, "patchify", expected, got)

    _check.expect_dim("patchify", "frames", frames, 5, "(B, T, C, H, W)")
    floats = "float32, float16, bfloat16 or float64"
    got = _check.dtype_text(frames.dtype)
    expect(frames.dtype in (torch.uint8, *_check.FLOATS), f"frames of dtype uint8, {floats}", got)
    _check.expect_index("patchify", "index", index, frames, "(K,)")
    if reference_index is not None:
        _check.expect_index("patchify", "reference_index", reference_index, frames, "(K,)")
        shape = f"reference_index of shape (K,)=({index.shape[0]},)"
        expect(reference_index.shape[0] == index.shape[0], shape, _check.shape_text(reference_index))
    if vectors is not None:
        expect(reference_index is not None, "vectors with a reference_index", "none")
        _check.expect_dtype("patchify", "vectors", vectors, torch.int64)
        shape = f"vectors of shape (K, 2)=({index.shape[0]}, 2)"
        expect(tuple(vectors.shape) == (index.shape[0], 2), shape, _check.shape_text(vectors))
        _check.expect_same_device("patchify", "vectors", vectors, frames)
    expect(len(patch) == 2 and patch[0] >= 1 and patch[1] >= 1, "patch as two sizes >= 1", list(patch))
    expect(tubelet >= 1, "tubelet >= 1", tubelet)
    _, T, C, H, W = frames.shape
    expect(T % tubelet == 0, f"T divisible by tubelet={tubelet}", f"T={T}")
    if not pad:
        even = H % patch[0] == 0 and W % patch[1] == 0
        expect(even, f"H and W divisible by patch={list(patch)} without pad", f"H={H} and W={W}")
    expect(order in ("cthw", "thwc"), 'order of "cthw" or "thwc"', f'"{order}"')
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        expect(C <= CHANNELS, f"C of at most {CHANNELS} with {name}", f"C={C}")
        expect(len(values) == C, f"{name} of C={C} values", len(values))
        for c, value in enumerate(values):
            good = math.isfinite(value) and (name == "mean" or value > 0)
            allowed = "finite" if name == "mean" else "finite and > 0"
            expect(good, f"{name} {allowed}", f"{name}[{c}]={value:g}")
    if dtype is not None:
        double = frames.dtype == torch.float64
        fits = dtype == torch.float64 if double else dtype in _check.FLOATS[:3]
        allowed = "float64 for float64 frames" if double else "float32, float16 or bfloat16"
        expect(fits, f"dtype of {allowed}", _check.dtype_text(dtype))


def output_dtype(frames: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (torch.float32 if frames.dtype == torch.uint8 else frames.dtype)


def affine(uint8: bool, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[list[float], list[float]]:
    """scale and shift of each channel in float64; a single one of all channels where neither mean nor std is given."""
    channels = next((len(values) for values in (mean, std) if values is not None), 1)
    std = [1.0] * channels if std is None else std
    mean = [0.0] * channels if mean is None else mean
    return [1 / ((255 if uint8 else 1) * s) for s in std], [m / s for m, s in zip(mean, std, strict=True)]


def grid_of(frames: Tensor, patch: Sequence[int], tubelet: int) -> tuple[int, int, int, int]:
    """B, T', h and w of the sites."""
    B, T, _, H, W = frames.shape
    return B, T // tubelet, (H + patch[0] - 1) // patch[0], (W + patch[1] - 1) // patch[1]


def pixels_at(
    site: Tensor, vectors: Tensor | None, grid: tuple[int, int, int, int], patch: Sequence[int], H: int, W: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """b and t [K] of sites, y [K, ph] and x [K, pw] of their pixels, moved by vectors, and which are inside."""
    (B, steps, high, wide), (ph, pw) = grid, patch
    valid = (site >= 0) & (site < B * steps * high * wide)
    site = torch.where(valid, site, 0)
    w, h, t, b = site % wide, site // wide % high, site // (wide * high) % steps, site // (wide * high * steps)
    y = h[:, None] * ph + torch.arange(ph, device=site.device)
    x = w[:, None] * pw + torch.arange(pw, device=site.device)
    if vectors is not None:
        y = y + vectors[:, :1].clamp(min=-H - ph, max=H + ph)
        x = x + vectors[:, 1:].clamp(min=-W - pw, max=W + pw)
    inside = valid[:, None] & (y >= 0) & (y < H)
    return b, t, y, x, inside[:, :, None] & ((x >= 0) & (x < W))[:, None, :]


def reference(
    frames, index, patch, tubelet=1, reference_index=None, vectors=None, *,
    mean=None, std=None, dtype=None, order="cthw", pad=False,
) -> Tensor:  # fmt: skip
    check(frames, index, patch, tubelet, reference_index, vectors, mean, std, dtype, order, pad)
    B, steps, high, wide = grid_of(frames, patch, tubelet)
    sites, (ph, pw), (H, W) = B * steps * high * wide, patch, frames.shape[-2:]
    _check.expect_all_in_range("patchify", "index", index, sites)
    if reference_index is not None:
        _check.expect_all_in_range("patchify", "reference_index", reference_index, sites)
    width = frames.shape[2] * tubelet * ph * pw
    if sites == 0:
        return frames.new_zeros(index.shape[0], width, dtype=output_dtype(frames, dtype))
    moments = frames.unflatten(1, (steps, tubelet))
    scale, shift = (
        torch.tensor(values, dtype=torch.float64).to(frames.device, accumulator(frames.dtype))[:, None, None]
        for values in affine(frames.dtype == torch.uint8, mean, std)
    )

    def gather(site: Tensor, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The pixels [K, tubelet, C, ph, pw] of sites, and which of them are inside: [K, 1, 1, ph, pw]."""
        b, t, y, x, inside = pixels_at(site, vectors, (B, steps, high, wide), patch, H, W)
        y, x = (at.clamp(min=0, max=size - 1) for at, size in ((y, H), (x, W)))
        found = moments[b[:, None, None], t[:, None, None], :, :, y[:, :, None], x[:, None, :]]
        return found.permute(0, 3, 4, 1, 2).to(scale.dtype), inside[:, None, None]

    x, inside = gather(index)
    out = torch.where(inside, x * scale - shift, 0)
    if reference_index is not None:
        r, seen = gather(reference_index, vectors)
        alone = torch.where(seen, 0 - (r * scale - shift), out)
        out = torch.where(inside & seen, (x - r) * scale, torch.where(inside, out, alone))
        out = torch.where(((index >= 0) & (index < sites))[:, None, None, None, None], out, 0)
    out = out.permute(0, 2, 1, 3, 4) if order == "cthw" else out.permute(0, 1, 3, 4, 2)
    return out.to(output_dtype(frames, dtype)).reshape(index.shape[0], width)


def fake(
    frames, index, patch, tubelet=1, reference_index=None, vectors=None, *,
    mean=None, std=None, dtype=None, order="cthw", pad=False,
) -> Tensor:  # fmt: skip
    check(frames, index, patch, tubelet, reference_index, vectors, mean, std, dtype, order, pad)
    width = frames.shape[2] * tubelet * patch[0] * patch[1]
    return frames.new_empty(index.shape[0], width, dtype=output_dtype(frames, dtype))


def setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    frames, index, ctx.patch, ctx.tubelet, reference_index, vectors = inputs
    ctx.shape, ctx.dtype = frames.shape, frames.dtype
    ctx.grid, ctx.order = grid_of(frames, ctx.patch, ctx.tubelet), keyword_only_inputs["order"]
    ctx.normalised = keyword_only_inputs["std"] is not None
    ctx.scale, _ = affine(False, None, keyword_only_inputs["std"])
    ctx.save_for_backward(index, reference_index, vectors)


def backward(ctx, grad: Tensor):
    """Sums the rows of each site, those that refer to it taken away, and lays the sites out as frames."""
    index, reference_index, vectors = ctx.saved_tensors
    (B, steps, high, wide), (ph, pw), (_, T, C, H, W) = ctx.grid, ctx.patch, ctx.shape
    sites, rows = B * steps * high * wide, grad.to(accumulator(ctx.dtype))
    if reference_index is not None:
        used = (index >= 0) & (index < sites)
        index, rows = torch.cat([index, torch.where(used, reference_index, -1)]), torch.cat([rows, -rows])
    if vectors is not None:
        values = by_pixel(ctx, index, torch.cat([torch.zeros_like(vectors), vectors]), rows)
    else:
        members, offsets = torch.ops.vtok.group(index, sites)
        values, _ = torch.ops.vtok.merge(rows.contiguous(), members, offsets, reduce="sum")
        if ctx.order == "cthw":  # each comes to [B, T', h, w, tubelet, C, ph, pw]
            values = values.view(B, steps, high, wide, C, ctx.tubelet, ph, pw).transpose(4, 5)
        else:
            values = values.view(B, steps, high, wide, ctx.tubelet, ph, pw, C).permute(0, 1, 2, 3, 4, 7, 5, 6)
        values = values.permute(0, 1, 4, 5, 2, 6, 3, 7).reshape(B, T, C, high * ph, wide * pw)[..., :H, :W]
    if ctx.normalised:
        values = torch.stack([values.select(2, c) * scale for c, scale in enumerate(ctx.scale)], 2)
    return values.to(ctx.dtype), None, None, None, None, None


def by_pixel(ctx, index: Tensor, vectors: Tensor, rows: Tensor) -> Tensor:
    """[B, T, C, H, W]: the sums of rows whose blocks begin anywhere, for each place in a step's frames."""
    (B, steps, _, _), (ph, pw), (_, T, C, H, W), K = ctx.grid, ctx.patch, ctx.shape, index.shape[0]
    b, t, y, x, inside = pixels_at(index, vectors, ctx.grid, ctx.patch, H, W)
    place = ((b * steps + t)[:, None, None] * H + y[:, :, None]) * W + x[:, None, :]
    if ctx.order == "cthw":
        rows = rows.view(K, C, ctx.tubelet, ph, pw).permute(0, 3, 4, 1, 2)
    else:
        rows = rows.view(K, ctx.tubelet, ph, pw, C).permute(0, 2, 3, 4, 1)
    members, offsets = torch.ops.vtok.group(torch.where(inside, place, -1).flatten(), B * steps * H * W)
    values, _ = torch.ops.vtok.merge(rows.reshape(K * ph * pw, C * ctx.tubelet), members, offsets, reduce="sum")
    return values.view(B, steps, H, W, C, ctx.tubelet).permute(0, 1, 5, 4, 2, 3).reshape(B, T, C, H, W)
