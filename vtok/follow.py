"""A video of any length through a Stream, chunk by chunk: what was kept, rebuilt and lost, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtok import methods, trial, video
from vtok.draw import draw, kept_per_frame, residuals
from vtok.rebuild import rebuild_patches
from vtok.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtok.packed import Packed

CHUNK = 32  # frames
CELLS = 24  # of the contact sheet


@dataclass(frozen=True)
class Piece:
    """Some frames, as they were, what was kept of them, as they are rebuilt, and, of gates, what each kept patch adds.

    All uint8 (T, H, W, 3).
    """

    frames: Tensor
    shown: Tensor
    rebuilt: Tensor
    added: Tensor | None = None

    @property
    def panels(self) -> dict[str, Tensor]:
        named = {"original": self.frames, "kept": self.shown, "rebuilt": self.rebuilt}
        return named if self.added is None else named | {"residuals": self.added}


@dataclass
class Account:
    """What has gone by so far."""

    frames: int = 0
    decoded: int = 0
    tokens: int = 0
    rows: int = 0
    error: float = 0.0  # sum of squares
    values: int = 0
    size: tuple[int, int] = (0, 0)
    rate: Fraction = Fraction(1)  # frames per second to play them at, that of the first chunk
    problem: str | None = None
    cells: list[tuple[float, int, int, Tensor]] = field(default_factory=list)  # time, kept, of, picture
    step: int = 1  # frames from one cell to the next

    @property
    def psnr(self) -> float:
        return 10 * math.log10(255**2 * self.values / self.error) if self.error else math.inf

    def add(self, clip: video.Clip, packed: Packed, piece: Piece) -> None:
        counts = kept_per_frame(piece.frames, packed)
        self.rate = self.rate if self.frames else clip.rate
        for i, kept in enumerate(counts):
            if (self.frames + i) % self.step == 0:
                picture = piece.shown[i].clone()  # not a view, which would hold the chunk
                self.cells.append((clip.times[i], kept, packed.layout.total // len(counts), picture))
        while len(self.cells) > CELLS:
            self.cells, self.step = self.cells[::2], self.step * 2
        self.frames += len(counts)
        self.decoded += clip.decoded
        self.tokens += packed.layout.total
        self.rows += packed.index.shape[0]
        self.error += (piece.frames.float() - piece.rebuilt.float()).square().sum(dtype=torch.float64).item()
        self.values += piece.frames.numel()
        self.size, self.problem = (clip.width, clip.height), clip.problem


def follow(
    path: Path,
    *,
    fps: Fraction,
    size: int,
    patch: int,
    method: str,
    amount: trial.Amount,
    device: torch.device,
    account: Account,
    progress: Callable[[float, float | None], None],
) -> Iterator[Piece]:
    """Each chunk of the video, and the sum of it in ``account``.

    A gate's state is carried on under a threshold; otherwise each chunk is a window with a budget of its own.
    """
    gates = methods.get(method).kind == "gate"
    carried = gates and "threshold" in amount
    settings: dict[str, Any] = {"patch": patch} if gates else {}
    stream = Stream(method, window=None if carried else CHUNK, **settings, **amount)
    held = before = None
    for clip in video.chunks(path, fps=fps, size=size, patch=patch, frames=CHUNK, progress=progress):
        frames = clip.frames.to(device)
        packed = stream.push(trial.normalised(frames) if gates else trial.patchify(frames, patch))
        if not packed.layout.total:  # the last window, which is not full
            packed = stream.flush()
        packed = packed.trim()
        if packed.vectors is None:
            rows = packed.unmerge(fill="zero").unflatten(0, (len(frames), -1))
            rebuilt, held = _hold(rows, (packed.assignment >= 0).unflatten(0, (len(frames), -1)), held)
            pixels = trial.pixels_of(rebuilt, clip.frames.shape, patch)
        else:
            rebuilt = rebuild_patches(packed, patch=patch, before=held)
            pixels, held = trial.levels(rebuilt), rebuilt[:, -1:]
        pixels = pixels.cpu()
        added = residuals(clip.frames, pixels, packed, patch=patch, before=before) if gates else None
        piece, before = Piece(clip.frames, draw(clip.frames, packed, patch=patch), pixels, added), pixels[-1]
        account.add(clip, packed, piece)
        yield piece


def _hold(rows: Tensor, known: Tensor, held: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows [T, N, P], the unknown ones replaced by the last known one of their site, before it by ``held`` [N, P]."""
    before = torch.zeros_like(rows[0]) if held is None else held
    out = torch.empty_like(rows)
    for t in range(rows.shape[0]):
        before = out[t] = torch.where(known[t, :, None], rows[t], before)
    return out, before
