"""gate_patches: static patches are skipped before the vision encoder sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok import methods, ops
from vtok.compress import make_goal, own_budget
from vtok.decide import Goal
from vtok.layout import Layout, whole_number
from vtok.packed import Packed
from vtok.sites import kept_before

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
        residual: each row is minus the row kept before it at its site, where there is one; where the method searched,
            minus the block of the step before that its vector points to.

    Returns:
        Packed. values [K, merge_size²·P], P = C·tubelet·height·width numbers a patch: the patches of a unit row by row,
        so that ``values.view(-1, P)`` is what a Qwen-VL tower takes, and ``values @ conv.weight.flatten(1).T`` is the
        patch embedding. index, positions and layout count units. ``unmerge(fill="hold")`` gives the carried form, each
        site's last kept row, and ``run_lengths`` how many steps each row stands for. ``vectors`` [S, 2] is where a
        method that searched found each unit in the step before; ``vtok.rebuild_patches`` follows them.

    Raises:
        ValueError, TypeError or RuntimeError, before anything runs: sizes that do not divide, impossible budgets, a
        threshold that is negative or no number, another method's options.

    Never syncs, and compiles with ``fullgraph=True, dynamic=True``; lists, floors and a method's own budget then need a
    Plan made outside. Reads the frames once to score them, and the kept patches once more to write them.
    """
    patches = PatchGate.of(
        patch=patch, method=method, tubelet=tubelet, merge_size=merge_size, residual=residual,
        mean=mean, std=std, dtype=dtype, order=order, **options,
    )  # fmt: skip
    layout = patches.layout(frames)
    if budget is None and total_budget is None and threshold is None and patches.method.budget:
        budget = own_budget(layout, patches.method, options)
    goal = make_goal(layout, budget, total_budget, threshold, capacity, min_per_frame)
    return patches(frames, goal, threshold)[0]


@dataclass(frozen=True)
class PatchGate:
    """A gate method and how its rows are written: everything but the frames."""

    method: methods.Method
    patch: Sides
    tubelet: int
    merge_size: int
    residual: bool
    writing: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def of(
        cls, *, patch: Any, method: str = "grt", tubelet: int = 1, merge_size: int = 1, residual: bool = False,
        mean: Any = None, std: Any = None, dtype: Any = None, order: str = "cthw", **options: Any,
    ) -> PatchGate:  # fmt: skip
        """The keywords of ``gate_patches`` that say neither how much nor of what."""
        chosen = methods.get(method, "gate")
        chosen.check_options(options)
        sides, tubelet = patch_sides(patch), whole_number("tubelet", tubelet, least=1)
        writing = {"mean": mean, "std": std, "dtype": dtype, "order": order}
        return cls(chosen, sides, tubelet, whole_number("merge_size", merge_size, least=1), residual, writing, options)

    @property
    def unit(self) -> Sides:
        """Height and width of a merge unit in pixels."""
        return self.patch[0] * self.merge_size, self.patch[1] * self.merge_size

    def layout(self, frames: Tensor) -> Layout:
        """The layout of the merge units of frames [B, T, C, H, W]."""
        if not isinstance(frames, Tensor) or frames.dim() != 5:
            got = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise ValueError(f"expected frames of shape [B, T, C, H, W], got {got}")
        videos, count, _, height, width = frames.shape
        h, w = height // self.unit[0], width // self.unit[1]
        if not h or not w or (h * self.unit[0], w * self.unit[1]) != (height, width):
            raise ValueError(
                f"expected frames in whole units of {self.unit[0]}x{self.unit[1]} pixels, got {height}x{width}"
            )
        if count % self.tubelet:
            raise ValueError(f"expected frames divisible by tubelet={self.tubelet}, got {count}")
        return Layout.uniform(videos, count // self.tubelet, h, w, device=frames.device)

    def __call__(self, frames: Tensor, goal: Goal, threshold: float | None, state: Any = None) -> tuple[Packed, Any]:
        """What the goal keeps of frames that follow on ``state``, and the state after them."""
        gated = self.method.call(frames.detach(), self.unit, self.tubelet, threshold, state, **self.options)
        score = gated.score.flatten().to(torch.float32)
        index, cu_seqlens, counts = goal.choose(score, None if gated.keep is None else gated.keep.flatten())
        vectors = None if gated.vectors is None else gated.vectors.flatten(0, 3)
        values = self.write(frames, index, goal.layout, vectors)
        packed = Packed(
            values, index, cu_seqlens, goal.layout, scores=score, counts=counts, longest=goal.longest, vectors=vectors
        )
        return packed, gated.state

    def write(self, frames: Tensor, index: Tensor, layout: Layout, vectors: Tensor | None) -> Tensor:
        """The rows of the chosen units, [K, merge_size²·P]."""
        before = moves = None
        if self.residual:
            before = kept_before(index, layout) if vectors is None else step_before(index, layout)
            before = patches_of(before, layout, self.merge_size)
        if self.residual and vectors is not None:
            moves = torch.nn.functional.pad(vectors, (0, 0, 0, 1))[index]  # padding takes the zeros at the end
            moves = moves.repeat_interleave(self.merge_size**2, 0)
        site = patches_of(index, layout, self.merge_size)
        rows = ops.patchify(frames, site, list(self.patch), self.tubelet, before, moves, **self.writing)
        return rows.reshape(index.shape[0], self.merge_size**2 * rows.shape[1])


def patch_sides(patch: int | Sequence[int]) -> Sides:
    """(height, width) of a patch."""
    sides = (patch, patch) if not isinstance(patch, Sequence) else tuple(patch)
    if len(sides) != 2:
        raise ValueError(f"expected patch as one side or (height, width), got {patch!r}")
    return whole_number("patch", sides[0], least=1), whole_number("patch", sides[1], least=1)


def step_before(index: Tensor, layout: Layout) -> Tensor:
    """int64 [K]: the row of the same site one step earlier; -1 in first steps and for padding."""
    t, h, w = layout.grid_of_each or layout.grids[0]
    return torch.where((index >= 0) & (index // (h * w) % t > 0), index - h * w, -1)


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
