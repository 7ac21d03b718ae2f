"""gate_patches: static patches are skipped before the vision encoder sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok import methods, ops
from vtok.compress import make_floor, make_plan
from vtok.decide import gate, select
from vtok.layout import Layout, whole_number
from vtok.packed import Packed, along_time

Sides = tuple[int, int]


def gate_patches(
    frames: Tensor,
    *,
    patch: int | Sequence[int],
    budget: Any = None,
    total_budget: Any = None,
    threshold: float | None = None,
    capacity: int | None = None,
    method: str = "grt",
    tubelet: int = 1,
    merge_size: int = 1,
    min_per_frame: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    order: str = "cthw",
    residual: bool = False,
    **options: Any,
) -> Packed:
    """Keep the patches of pixels that moved: the rows that a vision encoder has to look at.

    Args:
        frames: uint8, float32, float16, bfloat16 or float64, shape [B, T, C, H, W].
        patch: side of the encoder's patch in pixels, or (height, width).
        budget, total_budget, min_per_frame: rows to keep of each video or of all, as in ``vtok.compress``: exactly
            that many. Without any the method's own budget holds, where it has one.
        threshold: instead of a budget, keep what the method's gate lets through; ``capacity`` rows are allocated for
            it, all by default. What is left over is padding; see Packed.counts and trim.
        method: a name in ``vtok.methods.names("gate")``; ``options`` are its own.
        tubelet: frames of a step; T is divisible by it. Rows, budgets and positions count steps.
        merge_size: a row is a whole merge unit of merge_size x merge_size patches, judged, kept and dropped as one:
            what becomes one token of a Qwen-VL model.
        mean, std, dtype, order: how ``vtok.ops.patchify`` writes a patch: normalised, cast, in the order of a flattened
            convolution weight.
        residual: each row is minus the row kept before it at its site, where there is one.

    Returns:
        Packed. values [K, merge_size²·P], P = C·tubelet·height·width numbers a patch: the patches of a unit row by row,
        so that ``values.view(-1, P)`` is what a Qwen-VL tower takes, and ``values @ conv.weight.flatten(1).T`` is the
        patch embedding. index, positions and layout count units. ``unmerge(fill="hold")`` gives the carried form, each
        site's last kept row, and ``run_lengths`` how many steps each row stands for.

    Raises:
        ValueError, TypeError or RuntimeError, before anything runs: sizes that do not divide, impossible budgets, a
        threshold that is negative or no number, another method's options.

    Never syncs. Reads the frames once to score them, and the kept patches once more to write them.
    """
    sides = patch_sides(patch)
    layout, unit = units(frames, sides, tubelet, merge_size)
    chosen = methods.get(method, kind="gate")
    chosen.check_options(options)
    counts = None
    if threshold is None:
        if capacity is not None:
            raise ValueError("expected capacity with a threshold only")
        if budget is None and total_budget is None and chosen.budget:
            budget = [chosen.budget(grid, **options) for grid in layout.grids]
        plan = make_plan(layout, budget, total_budget, min_per_frame)
        score = chosen.call(frames, unit, tubelet, None, None, **options).score.flatten()
        index, cu_seqlens, longest = select(score, plan), plan.cu_seqlens, plan.longest
    else:
        if budget is not None or total_budget is not None:
            raise ValueError("expected one of budget, total_budget and threshold, got more")
        longest = layout.total if capacity is None else whole_number("capacity", capacity, least=0)
        floor = make_floor(layout, min_per_frame)
        gated = chosen.call(frames, unit, tubelet, threshold, None, **options)
        score = gated.score.flatten()
        index, counts = gate(gated.keep.flatten(), score, layout, longest, floor)
        cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).clamp(max=longest)
    before = patches_of(along_time(index, layout)[0], layout, merge_size) if residual else None
    site = patches_of(index, layout, merge_size)
    values = ops.patchify(
        frames, site, sides, tubelet, reference_index=before, mean=mean, std=std, dtype=dtype, order=order
    )
    values = values.reshape(index.shape[0], merge_size**2 * values.shape[1])
    return Packed(values, index, cu_seqlens, layout, scores=score, counts=counts, longest=longest)


def patch_sides(patch: int | Sequence[int]) -> Sides:
    """(height, width) of a patch."""
    sides = (patch, patch) if not isinstance(patch, Sequence) else tuple(patch)
    if len(sides) != 2:
        raise ValueError(f"expected patch as one side or (height, width), got {patch!r}")
    return whole_number("patch", sides[0], least=1), whole_number("patch", sides[1], least=1)


def units(frames: Tensor, patch: Sides, tubelet: int, merge_size: int) -> tuple[Layout, Sides]:
    """The layout of the merge units of frames [B, T, C, H, W], and a unit's height and width in pixels."""
    if not isinstance(frames, Tensor) or frames.dim() != 5:
        got = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
        raise ValueError(f"expected frames of shape [B, T, C, H, W], got {got}")
    tubelet, merge_size = (
        whole_number(name, value, least=1) for name, value in (("tubelet", tubelet), ("merge_size", merge_size))
    )
    videos, count, _, height, width = frames.shape
    unit = (patch[0] * merge_size, patch[1] * merge_size)
    if height < unit[0] or width < unit[1] or height % unit[0] or width % unit[1]:
        raise ValueError(f"expected frames in whole units of {unit[0]}x{unit[1]} pixels, got {height}x{width}")
    if count % tubelet:
        raise ValueError(f"expected frames divisible by tubelet={tubelet}, got {count}")
    layout = Layout.uniform(videos, count // tubelet, height // unit[0], width // unit[1], device=frames.device)
    return layout, unit


def patches_of(unit: Tensor, layout: Layout, merge_size: int) -> Tensor:
    """int64 [K·merge_size²]: the patches of each merge unit, row by row, as sites of the whole grid; -1 stays."""
    if merge_size == 1:
        return unit
    _, h, w = layout.grid_of_each or layout.grids[0]
    frame, site = unit // (h * w), unit % (h * w)
    step = torch.arange(merge_size, dtype=torch.int64, device=unit.device)
    rows = (frame * h + site // w)[:, None] * merge_size + step
    columns = (site % w)[:, None] * merge_size + step
    patches = rows[:, :, None] * (w * merge_size) + columns[:, None, :]
    return torch.where((unit >= 0)[:, None, None], patches, -1).flatten()
