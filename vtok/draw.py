"""The picture of what was kept: dropped patches grey and dark, a contact sheet, a side-by-side preview."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from vtok.packed import Packed

DIM = 0.3  # brightness of a dropped patch
CELL = 240  # pixels: small frames are enlarged to about this width
MARGIN = 12
LABEL = 24
HEADER = 76
PAPER, INK, FAINT, ACCENT = (16, 18, 22), (236, 238, 241), (140, 146, 156), (255, 176, 64)


def draw(frames: Tensor, packed: Packed, *, patch: int | None = None) -> Tensor:
    """The frames with every dropped patch grey and dark; where rows were merged, edges say how many a patch stands for.

    Args:
        frames: uint8, shape (T, H, W, 3), the frames of one video.
        packed: what a compressor made of their S tokens. With merging, a patch counts as kept where it stands for
            its group, a run or a cluster, and has an edge, the brighter the more tokens it is the mean of.
        patch: pixels a token spans each way; by default sqrt(T·H·W/S). Needed where a token spans several frames, the
            last one perhaps fewer.

    Returns:
        uint8 Tensor of the same shape, on the CPU.

    Raises:
        ValueError: frames of another shape or dtype, or tokens that don't tile them.
    """
    frames = frames.cpu()
    kept = _per_pixel(frames, packed.mask.cpu(), patch)
    grey = frames.float() @ torch.tensor([0.299, 0.587, 0.114]) * DIM
    shown = torch.where(kept[..., None], frames, grey.round().to(torch.uint8)[..., None])
    return _edged(shown, packed, patch) if packed.is_merged else shown


def _edged(frames: Tensor, packed: Packed, patch: int | None) -> Tensor:
    """Each patch that stands for several gets an edge at its top and left, full for the one that stands for most."""
    weight, kept = packed.weight.cpu(), packed.index.cpu() >= 0
    strength = weight.clamp(min=1).log2()
    strength = strength / strength.amax().clamp(min=1) if weight.numel() else strength
    each = torch.zeros(packed.mask.numel()).index_put((packed.index.cpu()[kept],), strength[kept])
    share = _per_pixel(frames, each, patch)
    inside = torch.zeros_like(share, dtype=torch.bool)
    side = patch or math.isqrt(share.numel() // max(1, each.numel()))
    inside[:, ::side], inside[:, :, ::side] = True, True
    share = torch.where(inside, share, 0)[..., None]
    return (frames * (1 - share) + torch.tensor(ACCENT) * share).round().to(torch.uint8)


def residuals(
    frames: Tensor, rebuilt: Tensor, packed: Packed, *, patch: int | None = None, before: Tensor | None = None
) -> Tensor:
    """What each kept patch adds to the clip as ``rebuilt`` from the ones before it: grey is nothing, dropped is dark.

    Both uint8 (T, H, W, 3); so is the result, on the CPU. A first frame, which adds everything, is as it is, unless it
    follows on ``before``, uint8 (H, W, 3), the rebuilt frame of the piece before.
    """
    frames, rebuilt = frames.cpu(), rebuilt.cpu()
    earlier = rebuilt[:-1] if before is None else torch.cat([before.cpu()[None], rebuilt[:-1]])
    opening = len(frames) - len(earlier)
    added = ((frames[opening:].int() - earlier.int()) / 2 + 128).clamp(0, 255).to(torch.uint8)
    kept = _per_pixel(frames, packed.mask.cpu(), patch)[..., None]
    return torch.where(kept, torch.cat([frames[:opening], added]), round(128 * DIM))


def kept_per_frame(frames: Tensor, packed: Packed) -> list[int]:
    """Rows kept of each frame; where a token spans several frames, each of them counts it."""
    moments = packed.layout.grids[0][0]
    span = -(-frames.shape[0] // moments)
    return packed.mask.view(moments, -1).sum(1).repeat_interleave(span)[: frames.shape[0]].tolist()


@dataclass(frozen=True)
class Grid:
    """Where the contact sheet puts its cells."""

    columns: int
    rows: int
    width: int  # of a picture, pixels
    height: int

    def corner(self, cell: int) -> tuple[int, int]:
        """Left and top of a cell's picture."""
        row, column = divmod(cell, self.columns)
        return MARGIN + column * (self.width + MARGIN), HEADER + row * (self.height + LABEL + MARGIN)

    @property
    def size(self) -> tuple[int, int]:
        return MARGIN + self.columns * (self.width + MARGIN), self.corner(self.columns * self.rows)[1]

    @staticmethod
    def of(cells: int, height: int, width: int) -> Grid:
        scale = max(1, round(CELL / width)) if width < CELL else min(1.0, 1.33 * CELL / width)
        columns = min(cells, max(3, 6 if cells > 12 else math.ceil(cells / 2) if cells > 4 else cells))
        return Grid(columns, -(-cells // columns), round(width * scale), round(height * scale))


def sheet(pictures: Tensor, labels: list[tuple[str, str]], title: str, facts: str) -> Image.Image:
    """A contact sheet of uint8 pictures (M, H, W, 3), each over its two labels, under a title and a line of facts."""
    from PIL import Image, ImageDraw

    grid = Grid.of(*pictures.shape[:3])
    width, height = grid.size
    written = max(_font(24).getlength(title), _font(17).getlength(facts))
    page = Image.new("RGB", (max(width, 2 * MARGIN + math.ceil(written)), height), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 10), title, INK, _font(24))
    pen.text((MARGIN, 44), facts, ACCENT, _font(17))
    for cell, (picture, (left, right)) in enumerate(zip(pictures.numpy(), labels, strict=True)):
        x, y = grid.corner(cell)
        page.paste(_enlarge(Image.fromarray(picture), grid.width, grid.height), (x, y))
        pen.text((x, y + grid.height + 3), left, INK, _font(15))
        pen.text((x + grid.width, y + grid.height + 3), right, FAINT, _font(15), anchor="ra")
    return page


def spread(frames: int, cells: int = 24) -> list[int]:
    """At most ``cells`` frame numbers, evenly spaced, first and last included."""
    return list(range(frames)) if frames <= cells else [round(i * (frames - 1) / (cells - 1)) for i in range(cells)]


def preview(panels: dict[str, Tensor]) -> Iterator[np.ndarray]:
    """Side by side, named above: one RGB picture of even sides per frame of the uint8 (T, H, W, 3) panels."""
    from PIL import Image, ImageDraw

    height, width = next(iter(panels.values())).shape[1:3]
    scale = max(1, round(320 / width))
    width, height = width * scale, height * scale
    page = Image.new("RGB", ((width + MARGIN) * len(panels) + MARGIN, height + LABEL + MARGIN), PAPER)
    page = page.resize((page.width + page.width % 2, page.height + page.height % 2))
    for place, name in enumerate(panels):
        ImageDraw.Draw(page).text((MARGIN + place * (width + MARGIN), 2), name, INK, _font(17))
    for pictures in zip(*panels.values(), strict=True):
        for place, picture in enumerate(pictures):
            at = (MARGIN + place * (width + MARGIN), LABEL)
            page.paste(_enlarge(Image.fromarray(picture.numpy()), width, height), at)
        yield np.asarray(page)


def _enlarge(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Pixels stay squares when a picture grows, and are averaged when it shrinks."""
    from PIL import Image

    method = Image.Resampling.NEAREST if width >= picture.width else Image.Resampling.BOX
    return picture.resize((width, height), method)


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _per_pixel(frames: Tensor, tokens: Tensor, patch: int | None) -> Tensor:
    """What tokens [S] have, a mask or a number, for the pixels (T, H, W)."""
    if frames.dim() != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"expected frames of uint8 and shape (T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    count, height, width, _ = frames.shape
    patch = patch or math.isqrt(count * height * width // max(1, tokens.numel()))
    rows, columns = (height // patch, width // patch) if patch else (0, 0)
    moments = tokens.numel() // max(1, rows * columns)
    span = -(-count // max(1, moments))
    whole = (rows * patch, columns * patch, moments * rows * columns) == (height, width, tokens.numel())
    if not whole or -(-count // max(1, span)) != moments:
        raise ValueError(
            f"expected tokens that tile {count} frames of {width}x{height} in squares, got {tokens.numel()}"
        )
    grid = tokens.view(moments, rows, columns)
    return grid.repeat_interleave(span, 0)[:count].repeat_interleave(patch, 1).repeat_interleave(patch, 2)
