"""rebuild_patches: the frames that the rows of gate_patches tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtok.gate import patch_sides
from vtok.ops import _patch
from vtok.packed import Packed


def rebuild_patches(
    packed: Packed,
    *,
    patch: int | Sequence[int],
    tubelet: int = 1,
    merge_size: int = 1,
    order: str = "cthw",
    residual: bool = False,
    before: Tensor | None = None,
) -> Tensor:
    """The frames of ``packed``, step by step: what was kept as it is, what was dropped from the step rebuilt before.

    A dropped unit is the block that its vector points to (``Packed.vectors``), without vectors its own place. Where
    nothing was kept yet it is what ``before`` holds, without it zero.

    Args:
        packed: what ``vtok.gate_patches`` returned.
        patch, tubelet, merge_size, order, residual: what it was called with. Residual rows are added to what a dropped
            unit would be. With vectors that is exact as far as the step before is: the residual was taken from the
            pixels as they were, not as they are rebuilt.
        before: [B, tubelet, C, H, W], the step before the first, as the chunk before it was rebuilt.

    Returns:
        [B, T, C, H, W] in the dtype of ``packed.values``, normalised as they are; differentiable in them.

    Raises ValueError for rows, or a step before them, of another size. Never syncs.
    """
    (steps, h, w), (ph, pw) = packed.layout.grid_of_each or packed.layout.grids[0], patch_sides(patch)
    width, pixels = packed.values.shape[1], merge_size**2 * tubelet * ph * pw
    if width % pixels or order not in ("cthw", "thwc"):
        raise ValueError(f"expected rows of {pixels} values a channel in order cthw or thwc, got {width} in {order}")
    C, videos = width // pixels, packed.layout.videos
    own = (C, tubelet, ph, pw) if order == "cthw" else (tubelet, ph, pw, C)
    rows = packed.unmerge().view(videos, steps, h, w, merge_size, merge_size, *own)
    places = (1, 0, 7, 6, 2, 4, 8, 3, 5, 9) if order == "cthw" else (1, 0, 6, 9, 2, 4, 7, 3, 5, 8)
    rows = rows.permute(places).flatten(7, 9).flatten(4, 6)  # [T', B, tubelet, C, H, W]
    unit, (H, W) = [ph * merge_size, pw * merge_size], rows.shape[-2:]

    def each_pixel(units: Tensor) -> Tensor:
        """[S] -> [T', B, H, W]."""
        return _patch.pixels(units.view(videos, steps, h, w).transpose(0, 1), unit, H, W)

    kept = each_pixel(packed.assignment >= 0)[:, :, None, None]
    vectors = packed.index.new_zeros(packed.layout.total, 2) if packed.vectors is None else packed.vectors
    y = (torch.arange(H, device=rows.device)[:, None] + each_pixel(vectors[:, 0])).clamp(min=0, max=H - 1)
    x = (torch.arange(W, device=rows.device) + each_pixel(vectors[:, 1])).clamp(min=0, max=W - 1)
    video = torch.arange(videos, device=rows.device)[:, None, None]
    if before is not None and before.shape != rows.shape[1:]:
        raise ValueError(f"expected before of shape {tuple(rows.shape[1:])}, got {tuple(before.shape)}")
    frames = [rows.new_zeros(rows.shape[1:]) if before is None else before.to(rows)]
    for t in range(steps):
        moved = frames[-1][video, :, :, y[t], x[t]].movedim((-2, -1), (1, 2))  # [B, tubelet, C, H, W]
        frames.append(moved + rows[t] if residual else torch.where(kept[t], rows[t], moved))
    return torch.stack(frames[1:], 1).flatten(1, 2) if steps else rows.transpose(0, 1).flatten(1, 2)
