"""Layout: which rows of a packed batch belong to which video, frame and site."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(eq=False)
class Layout:
    """Where the rows of a packed batch come from: video after video, each in (t, h, w) order.

    Built outside a compiled graph from host integers, and passed in: the graph reads only the fields, so that a
    change of sizes never recompiles. ``Layout.from_grid`` for ragged batches, ``Layout.uniform`` for dense ones.

    Fields:
        total: rows in all (S), the extra rows included.
        frames: frames of all videos together (F).
        sites: sites of one frame of each video, together.
        longest: frames of the longest video.
        cu_seqlens: int64 [V+1] on the device, where each video starts; its last value is ``total``.
        cu_frames: int64 [V+1] on the device, the number of each video's first frame.
        tokens_per_frame: int64 [V] on the device, sites of one frame.
        width: int64 [V] on the device, sites of one row of a frame, at least 1.
        extra_rows: rows of each video after its grid (newline rows); they belong to no frame.
        rows_on_host: int64 [V] on the CPU, rows of each grid; None where all are alike.
        grid_on_host: int64 [V, 3] on the CPU, (t, h, w) in sites of each video; None where all are alike. Read by no
            graph: its 3 would be taken for a V of 3.
        grid_of_each: (t, h, w) in sites of every video, where all are alike by construction.
    """

    total: int
    frames: int
    sites: int
    longest: int
    cu_seqlens: Tensor
    cu_frames: Tensor
    tokens_per_frame: Tensor
    width: Tensor
    extra_rows: int = 0
    rows_on_host: Tensor | None = None
    grid_on_host: Tensor | None = None
    grid_of_each: tuple[int, int, int] | None = None

    @classmethod
    def from_grid(
        cls,
        grid_thw: Any,
        merge_size: int = 1,
        extra_rows: int = 0,
        device: torch.device | str = "cpu",
    ) -> Layout:
        """The layout of videos with the grids ``grid_thw``.

        Args:
            grid_thw: host integers of shape (V, 3), one (t, h, w) per video: nested lists, a NumPy array or a CPU
                tensor, as in ``video_grid_thw``. A tensor on another device is refused: reading it would wait for it.
            merge_size: h and w are divided by it; a remainder is an error.
            extra_rows: rows of each video after its grid.
            device: where the tokens are.

        Raises ValueError or TypeError for anything else. Copies 16·(2·V+1) bytes to the device, without waiting for it.
        """
        grids = host_grids(grid_thw, merge_size)
        extra_rows = whole_number("extra_rows", extra_rows, least=0)
        starts = cumulative([t * h * w + extra_rows for t, h, w in grids])
        frames = cumulative([t for t, _, _ in grids])
        return cls(
            total=starts[-1],
            frames=frames[-1],
            sites=sum(h * w for _, h, w in grids),
            longest=max((t for t, _, _ in grids), default=0),
            cu_seqlens=upload(starts, device),
            cu_frames=upload(frames, device),
            tokens_per_frame=upload([h * w for _, h, w in grids], device),
            width=upload([max(w, 1) for _, _, w in grids], device),
            extra_rows=extra_rows,
            rows_on_host=torch.tensor([t * h * w for t, h, w in grids], dtype=torch.int64),
            grid_on_host=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        )

    @classmethod
    def uniform(cls, videos: int, t: int, h: int, w: int, device: torch.device | str = "cpu") -> Layout:
        """The layout of ``videos`` videos of ``t`` frames of ``h`` x ``w`` sites; may be made inside a graph."""
        return cls(
            total=videos * t * h * w,
            frames=videos * t,
            sites=videos * h * w,
            longest=t,
            cu_seqlens=torch.arange(videos + 1, dtype=torch.int64, device=device) * (t * h * w),
            cu_frames=torch.arange(videos + 1, dtype=torch.int64, device=device) * t,
            tokens_per_frame=torch.full((videos,), h * w, dtype=torch.int64, device=device),
            width=torch.full((videos,), torch.sym_max(w, 1), dtype=torch.int64, device=device),
            grid_of_each=(t, h, w),
        )

    @cached_property
    def grids(self) -> list[tuple[int, int, int]]:
        """(t, h, w) of each video on the host, h and w in sites. No field: compiled code never reads it."""
        if self.grid_of_each is not None:
            return [self.grid_of_each] * self.videos
        if self.grid_on_host is None:
            raise ValueError("expected a Layout made by from_grid or uniform, got one without its grids")
        return [tuple(grid) for grid in self.grid_on_host.tolist()]

    @property
    def videos(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @property
    def grid_rows(self) -> Tensor:
        """int64 [V] on the device: rows of each video's grid, without its extra rows."""
        return self.cu_seqlens.diff() - self.extra_rows

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device."""
        return Layout.from_grid(self.grids, extra_rows=self.extra_rows, device=device)

    def video_of(self, index: Tensor) -> Tensor:
        """int64, the video of each row number; a number outside the batch gives the nearest video. Needs V >= 1."""
        video = torch.searchsorted(self.cu_seqlens, index, right=True) - 1
        return video.clamp(0, self.videos - 1)

    def positions(self, index: Tensor) -> Tensor:
        """(t, h, w) of rows, exact for any size.

        Args:
            index: int64 [K] on the layout's device, row numbers; a negative one is padding.

        Returns:
            int64 [K, 3]: frame, row and column in sites, counted from 0; -1 for padding. Rows after the grid go on
            counting: (T, 0, 0), (T, 0, 1), ... Never syncs.
        """
        if self.videos == 0:
            return index.new_full((index.shape[0], 3), -1)
        # A grid of frames without sites has rows after it alone: they are counted from its frames on.
        local, sites, width = index, self.tokens_per_frame.clamp(min=1), self.width
        frames = torch.where(self.tokens_per_frame > 0, 0, self.cu_frames.diff())
        if self.videos > 1:
            video = self.video_of(index)
            local, sites, width, frames = index - self.cu_seqlens[video], sites[video], width[video], frames[video]
        t = local // sites
        site = local - t * sites
        h = site // width
        return torch.where((index >= 0)[:, None], torch.stack([t + frames, h, site - h * width], -1), -1)

    def frame_of(self, index: Tensor) -> Tensor:
        """int64, the frame of each row number, all videos' frames counted through; F after the grids. Needs V >= 1."""
        video = self.video_of(index)
        local, sites, begin = index - self.cu_seqlens[video], self.tokens_per_frame[video], self.cu_frames[video]
        inside = local < (self.cu_frames[1:][video] - begin) * sites
        return torch.where(inside, local // sites.clamp(min=1) + begin, self.frames)

    def columns(self, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Where each row stands when a video's rows are sorted by site, then time; needs V >= 1. Never syncs.

        Returns int64 [S] each: the row's place, the first place of its site, and the places of its site. A row after
        the grid is a site of its own. With a stride every so many frames are a column: a site has that many.
        """
        row = torch.arange(self.total, dtype=torch.int64, device=self.device)
        video = self.video_of(row)
        sites, frames = self.tokens_per_frame[video], self.cu_frames.diff()[video]
        start, some = self.cu_seqlens[video], sites.clamp(min=1)
        t, site = (row - start) // some, (row - start) % some
        inside, phase = row - start < frames * sites, t % stride
        before = phase * (frames // stride) + torch.minimum(phase, frames % stride)  # frames of earlier phases
        length = frames // stride + (phase < frames % stride)
        column = torch.where(inside, start + before * sites + site * length, row)
        return torch.where(inside, column + t // stride, row), column, torch.where(inside, length, 1)

    def frame_starts(self) -> tuple[Tensor, Tensor]:
        """(int64 [F] first row of each frame, int64 [F] its rows), all videos' frames in order. Never syncs."""
        frame = torch.arange(self.frames, dtype=torch.int64, device=self.device)
        video = torch.searchsorted(self.cu_frames, frame, right=True) - 1
        sites = self.tokens_per_frame[video]
        return self.cu_seqlens[video] + (frame - self.cu_frames[video]) * sites, sites

    def extra_mask(self) -> Tensor:
        """bool [S]: the rows after the grids."""
        row = torch.arange(self.total, dtype=torch.int64, device=self.device)
        return row >= self.cu_seqlens[1:][self.video_of(row)] - self.extra_rows


def host_grids(grid_thw: Any, merge_size: int = 1) -> list[tuple[int, int, int]]:
    """(t, h, w) in sites of each video, from host integers alone."""
    merge_size = whole_number("merge_size", merge_size, least=1)
    if isinstance(grid_thw, Layout):
        raise TypeError("expected grid_thw as integers of shape (V, 3), got a Layout")
    if isinstance(grid_thw, Tensor):
        if grid_thw.device.type != "cpu":
            raise ValueError(
                f"expected grid_thw on the host (a list or a CPU tensor), got a tensor on {grid_thw.device}: "
                "reading it would wait for the device"
            )
        if grid_thw.dtype.is_floating_point or grid_thw.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise TypeError(f"expected grid_thw of integers, got {grid_thw.dtype}")
    if hasattr(grid_thw, "tolist"):
        grid_thw = grid_thw.tolist()
    try:
        grids = [tuple(whole_number("grid_thw", side, least=0) for side in grid) for grid in grid_thw]
    except TypeError as error:
        raise TypeError(f"expected grid_thw as integers of shape (V, 3), got {grid_thw!r}") from error
    for t, h, w in (grid if len(grid) == 3 else _not_three(grid) for grid in grids):
        if h % merge_size or w % merge_size:
            raise ValueError(f"expected h and w divisible by merge_size={merge_size}, got the grid {(t, h, w)}")
    return [(t, h // merge_size, w // merge_size) for t, h, w in grids]


def _not_three(grid: tuple) -> tuple:
    raise ValueError(f"expected grid_thw of shape (V, 3), got a grid of {len(grid)} numbers: {grid}")


def whole_number(name: str, value: Any, *, least: int) -> int:
    """``value`` as an int that is at least ``least``; a bool or a float is a TypeError."""
    if isinstance(value, bool):
        raise TypeError(f"expected {name} as an integer, got {value}")
    try:
        number = value if isinstance(value, int) else operator.index(value)  # the latter would fix a symbolic int
    except TypeError as error:
        raise TypeError(f"expected {name} as an integer, got {value!r}") from error
    if number < least:
        raise ValueError(f"expected {name} of at least {least}, got {number}")
    return number


def cumulative(sizes: list[int]) -> list[int]:
    """Where parts of these sizes start, and where the last one ends."""
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return bounds


def upload(numbers: list[int], device: torch.device | str) -> Tensor:
    """int64 on the device; from pinned memory on CUDA, so that nothing waits."""
    on_host = torch.tensor(numbers, dtype=torch.int64)
    if torch.device(device).type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def register_tree(cls: Any, names: list[str]) -> None:
    """Make a class a pytree node of these attributes, for torch.export and tree_map."""

    def unflatten(children: Iterable[Any], _: None) -> Any:
        made = cls.__new__(cls)
        for name, child in zip(names, children, strict=True):
            setattr(made, name, child)
        return made

    _pytree.register_pytree_node(
        cls,
        lambda made: ([getattr(made, name) for name in names], None),
        unflatten,
        serialized_type_name=f"vtok.{cls.__name__}",
        flatten_with_keys_fn=lambda made: ([(_pytree.GetAttrKey(n), getattr(made, n)) for n in names], None),
    )


register_tree(Layout, [field.name for field in fields(Layout)])


def constant_in_graph(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result`` without the second that it takes to import torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
