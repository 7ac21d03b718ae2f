"""Packed: what a compressor returns."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from vtok import _file, ops, sites
from vtok.layout import Layout, cumulative, register_tree


class Packed:
    """The kept rows of a batch, packed back to back in (video, t, h, w) order, and where each came from.

    S source rows, K output rows, V videos, D channels. Output rows that a threshold left unused are padding: values
    zero, index and positions -1, weight 0.

    Attributes:
        values: [K, D], dtype of the tokens, differentiable in them.
        index: int64 [K], the source row of each output row; of a merged row its representative.
        positions: int64 [K, 3], (t, h, w) of each output row.
        weight: float32 [K], how many source rows each output row stands for; the sum of their sizes, where given.
        scores: float32 [S], what the decision was made by, or None where there was none.
        cu_seqlens: int64 [V+1], where each video starts in the output.
        assignment: int64 [S], the output row that each source row went into; -1 for a dropped row.
        counts: int64 [V], rows that passed the threshold, also those that the capacity had no room for (their sum
            above K shows that rows were lost); None under a budget, which is always met exactly.
        layout: the Layout of the source rows.
        sizes: float32 [S], what each source row already stood for (``weights`` of the call), or None for one each.
        shares: float32 [S], what each source row weighs in the mean of its output row, or None where that is its size.
        order: int64 [K], which output row is where in the order of the method's release; None where it was not asked.
        gap: float64 [], by how much the method's error is above the least one at most; None where none is promised.
        vectors: int64 [S, 2], (dy, dx) in pixels from each source row's patch to the block that it came from one step
            earlier, of dropped rows too; None where none were looked for.
        as_released: whether ``values`` are what a method's release makes of the source rows (``compat`` of some), which
            no weights of ``assignment`` give. That and ``weight`` then tell one row of each; ``reduce`` refuses.

    positions, weight, assignment are made at the first access, without a sync.
    """

    def __init__(
        self,
        values: Tensor,
        index: Tensor,
        cu_seqlens: Tensor,
        layout: Layout,
        *,
        scores: Tensor | None = None,
        counts: Tensor | None = None,
        longest: int | None = None,
        positions: Tensor | None = None,
        weight: Tensor | None = None,
        assignment: Tensor | None = None,
        is_merged: bool | None = None,
        sizes: Tensor | None = None,
        shares: Tensor | None = None,
        gap: Tensor | None = None,
        order: Tensor | None = None,
        vectors: Tensor | None = None,
        as_released: bool = False,
    ) -> None:
        self.values, self.index, self.cu_seqlens, self.layout = values, index, cu_seqlens, layout
        self.scores, self.counts, self.sizes, self.shares = scores, counts, sizes, shares
        self.gap, self.order, self.vectors = gap, order, vectors
        self.longest = index.shape[0] if longest is None else longest
        self.is_merged = weight is not None if is_merged is None else is_merged
        self.as_released = as_released
        self._positions, self._weight, self._assignment = positions, weight, assignment

    def __repr__(self) -> str:
        videos, source = self.layout.videos, self.layout.total
        return f"Packed({videos} videos, {self.index.shape[0]} of {source} rows, values {tuple(self.values.shape)})"

    @property
    def positions(self) -> Tensor:
        if self._positions is None:
            self._positions = self.layout.positions(self.index)
        return self._positions

    @property
    def weight(self) -> Tensor:
        if self._weight is None:
            self._weight = (self.index >= 0).to(torch.float32)
        return self._weight

    @property
    def assignment(self) -> Tensor:
        if self._assignment is None:
            self._assignment = sites.slots_of(self.index, self.layout)
        return self._assignment

    @property
    def mask(self) -> Tensor:
        """bool [S]: the source rows in ``index``."""
        spare = torch.zeros(self.layout.total + 1, dtype=torch.bool, device=self.index.device)
        return spare.index_fill(0, self._kept_or_spare(), True)[:-1]

    def _kept_or_spare(self) -> Tensor:
        return torch.where(self.index < 0, self.layout.total, self.index)

    def take(self, x: Tensor) -> Tensor:
        """The rows of ``x`` [S, ...] at ``index``: position ids, cos and sin, deepstack features. Padding is zero."""
        self._expect_source(x)
        return ops.pack(_flat(x), self.index).reshape(self.index.shape[0], *x.shape[1:])

    def reduce(self, x: Tensor) -> Tensor:
        """The same merge applied to ``x`` [S, ...]: the mean of each output row's sources; ``take`` if none merged.

        ValueError for values as their release makes them, which are no such means: ``take``.
        """
        if self.as_released:
            raise ValueError("expected means by assignment to repeat on x, got values as their release makes them")
        if not self.is_merged:
            return self.take(x)
        self._expect_source(x)
        members, offsets = ops.group(self.assignment, self.index.shape[0])
        weights = self.sizes if self.shares is None else self.shares
        values, _ = ops.merge(_flat(x), members, offsets, as_weights(weights, x))
        return values.reshape(self.index.shape[0], *x.shape[1:])

    def _expect_source(self, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[0] != self.layout.total:
            raise ValueError(f"expected x with one row per source row ({self.layout.total}), got {tuple(x.shape)}")

    def unmerge(self, values: Tensor | None = None, *, fill: str = "zero") -> Tensor:
        """Back to one row per source row: each gets the output row that it went into.

        Args:
            values: [K, ...], for example what a model made of the output rows; the packed values if left out.
            fill: what a dropped row gets: "zero", or "hold": the last row kept at its site in an earlier frame of its
                video, before the first of them that first one, zero where the site kept none.

        Returns:
            [S, ...], differentiable in ``values``. Never syncs.
        """
        values = self.values if values is None else values
        if values.dim() < 1 or values.shape[0] != self.index.shape[0]:
            raise ValueError(f"expected values with {self.index.shape[0]} rows, got {tuple(values.shape)}")
        if fill not in ("zero", "hold"):
            raise ValueError(f"expected fill 'zero' or 'hold', got {fill!r}")
        source = self.assignment if fill == "zero" else sites.held(self.assignment, self.layout)
        return ops.pack(_flat(values), source).reshape(source.shape[0], *values.shape[1:])

    def then(self, later: Packed) -> Packed:
        """Two rounds as one: ``later`` compressed these values, the result goes back to this one's source rows.

        ``later = compress(packed.values, layout, weights=packed.weight, ...)`` with a layout of these K rows, as many
        videos as here; padding goes first (``trim``). Each source row joins what its output row joined, weights are
        sums over source rows, and where both rounds take means these are the means of all that was joined.

        Returns a Packed with this one's layout, sizes and scores, and ``later``'s values, cu_seqlens and counts.
        ValueError for another number of rows or videos, and where means were taken twice without weights.
        """
        if (later.layout.total, later.layout.videos) != (self.index.shape[0], self.layout.videos):
            want = f"{self.index.shape[0]} rows of {self.layout.videos} videos"
            raise ValueError(f"expected a later round of {want}, got {later.layout.total} of {later.layout.videos}")
        if self.is_merged and later.is_merged and later.sizes is None:
            raise ValueError("expected a later round with weights=packed.weight, got one whose means are of equal rows")
        assignment = _through(self.assignment, later.assignment)
        positions = None if self._positions is None else _through(later.index, self._positions)
        return Packed(
            later.values, _through(later.index, self.index), later.cu_seqlens, self.layout,
            scores=self.scores, counts=later.counts, longest=later.longest, positions=positions,
            weight=sum_members(assignment, later.index.shape[0], self.sizes), assignment=assignment,
            is_merged=self.is_merged or later.is_merged, sizes=self.sizes, shares=self._shares_through(later),
            vectors=self.vectors, as_released=self.as_released or later.as_released,
        )  # fmt: skip

    def positions_by(self, rule: str) -> Tensor:
        """int64 [K, 3]: (t, h, w) of each output row by a rule of its own where several rows became one.

        Args:
            rule: "centre", the row that the output row stands at, as ``positions``: a cluster's centre, a run's first
                row, the row that others joined; "first", the lowest of the rows that joined; or "mean", the mean of
                their positions, weighted by ``sizes``, each of (t, h, w) rounded half to even.

        Whole numbers, as rotary embeddings need them. A row that nobody joined keeps its own. Never syncs.
        """
        if rule not in ("centre", "first", "mean"):
            raise ValueError(f"expected rule 'centre', 'first' or 'mean', got {rule!r}")
        layout, own = self.layout, self.layout.positions(self.index)
        if rule == "centre" or layout.total == 0:
            return self.positions
        members, offsets = ops.group(self.assignment, self.index.shape[0])
        if rule == "first":
            place = layout.positions(members[offsets[:-1].clamp(max=layout.total - 1)])
        else:
            every = layout.positions(torch.arange(layout.total, dtype=torch.int64, device=members.device)).double()
            sizes = None if self.sizes is None else self.sizes.double()
            place = ops.merge(every, members, offsets, sizes)[0].round().to(torch.int64)
        joined = (offsets.diff() > 0)[:, None]
        return torch.where(joined, self.positions + place - own, self.positions)  # a stream's own count from its start

    def _shares_through(self, later: Packed) -> Tensor | None:
        """What each source row weighs in the mean that it ends up in after both rounds; None where that is its size."""
        plain = self.shares is None and later.shares is None and self.is_merged == later.is_merged
        if plain or self.as_released or later.as_released:
            return None
        weights, after = self._parts(), later._parts()
        total = sum_members(self.assignment, self.index.shape[0], weights)
        each = torch.where(total == 0, 0, after / total)
        return weights * ops.pack(each[:, None], self.assignment)[:, 0]

    def _parts(self) -> Tensor:
        """float32 [S]: what each source row weighs in its output row; without means only those that are one do."""
        if not self.is_merged:
            return self.mask.to(torch.float32)
        ones = torch.ones_like(self.assignment, dtype=torch.float32)
        return next((w for w in (self.shares, self.sizes) if w is not None), ones)

    def size_bias(self) -> Tensor:
        """float32 [K]: the logarithm of ``weight``, -inf for padding: what proportional attention adds to its logits.

        With it a row that stands for n equal ones draws as much attention as those n would. Source: ToMe.
        """
        return self.weight.log()

    @property
    def run_lengths(self) -> Tensor:
        """int64 [K]: steps from each output row to the next one at its site, or to the end of its video; 0 in padding.

        What RLT calls the length of a token.
        """
        return sites.until_next(self.index, self.layout)

    @property
    def frame_counts(self) -> Tensor:
        """int64 [F]: output rows of each frame, all videos' frames in order; rows after the grids are not counted."""
        first, sites = self.layout.frame_starts()
        rows = self._kept_or_spare()
        return torch.searchsorted(rows, first + sites) - torch.searchsorted(rows, first)

    @property
    def frame_cu_seqlens(self) -> Tensor:
        """int64 [F+1]: where each frame starts in the output. ValueError with rows after the grids: no frame's."""
        if self.layout.extra_rows:
            raise ValueError(f"expected a layout without extra rows, got {self.layout.extra_rows} per video")
        return torch.nn.functional.pad(self.frame_counts.cumsum(0), (1, 0))

    def mrope_positions(
        self,
        *,
        start: int | Tensor = 0,
        time_scale: int | float | Fraction = 1,
        renumber: bool = False,
        rule: str = "centre",
    ) -> Tensor:
        """Rotary position ids of the output rows for models with three axes, as integers all the way.

        Args:
            start: the id that each video begins at: an int, or int64 [V] on the device.
            time_scale: ids per frame, as Qwen2.5-VL's tokens_per_second · seconds per grid step: an int, a Fraction,
                or a float, read as the decimal it prints as. Frame t gets floor(t · time_scale).
            renumber: the number of the row in its video on all three axes, instead of where it came from.
            rule: where a merged row stands, as in ``positions_by``.

        Returns:
            int64 [3, K]: time, row, column, each from ``start``; -1 for padding. Never syncs.
        """
        scale = Fraction(str(time_scale)) if isinstance(time_scale, float) else Fraction(time_scale)
        if scale < 0:
            raise ValueError(f"expected time_scale of at least 0, got {time_scale}")
        if self.layout.videos == 0:
            return self.positions.T
        video = self.layout.video_of(self.index)
        if renumber:
            ids = torch.arange(self.index.shape[0], device=self.index.device) - self.cu_seqlens[video]
            ids = ids.expand(3, -1)
        else:
            t, h, w = self.positions_by(rule).unbind(-1)
            ids = torch.stack([t * scale.numerator // scale.denominator, h, w])
        begin = start[video] if isinstance(start, Tensor) else start
        return torch.where(self.index >= 0, ids + begin, -1)

    def padded(self) -> tuple[Tensor, Tensor]:
        """(values [V, Kmax, D], bool mask [V, Kmax] of the real rows): a video a line. Never syncs.

        Kmax is the longest video's count under a budget, and the capacity under a threshold.
        """
        slot = torch.arange(self.longest, dtype=torch.int64, device=self.index.device)
        rows = self.cu_seqlens[:-1, None] + slot
        mask = rows < self.cu_seqlens[1:, None]
        values = ops.pack(self.values, torch.where(mask, rows, -1).flatten())
        return values.reshape(self.layout.videos, self.longest, *self.values.shape[1:]), mask

    def trim(self) -> Packed:
        """The same without padding. Waits for the device, to learn how many rows there are; not for captured code."""
        kept = int(self.cu_seqlens[-1])
        return Packed(
            self.values[:kept],
            self.index[:kept],
            self.cu_seqlens,
            self.layout,
            scores=self.scores,
            counts=self.counts,
            longest=int(self.cu_seqlens.diff().amax()) if self.layout.videos else 0,
            positions=self.positions[:kept],
            weight=None if self._weight is None else self._weight[:kept],
            assignment=self._assignment,
            is_merged=self.is_merged,
            sizes=self.sizes,
            shares=self.shares,
            gap=self.gap,
            order=self.order,
            vectors=self.vectors,
            as_released=self.as_released,
        )

    def split(self) -> list[Packed]:
        """One Packed per video, as compressing it alone would give; padding goes. Views where rows need no renumbering.

        Waits for the device, to learn how many rows each video has; not for captured code.
        """
        rows, grids, extra = self.cu_seqlens.tolist(), self.layout.grids, self.layout.extra_rows
        source = cumulative([t * h * w + extra for t, h, w in grids])
        bounds = zip(rows, rows[1:], source, source[1:], strict=False)
        return [self._video(v, grids[v], slice(*b[:2]), slice(*b[2:])) for v, b in enumerate(bounds)]

    def _video(self, video: int, grid: tuple[int, int, int], rows: slice, source: slice) -> Packed:
        joined = None if self._assignment is None else (self._assignment[source] - rows.start).clamp(min=-1)
        return Packed(
            self.values[rows],
            self.index[rows] - source.start,
            self.cu_seqlens[video : video + 2] - rows.start,
            Layout.from_grid([grid], extra_rows=self.layout.extra_rows, device=self.layout.device),
            scores=None if self.scores is None else self.scores[source],
            counts=None if self.counts is None else self.counts[video : video + 1],
            longest=rows.stop - rows.start,
            positions=None if self._positions is None else self._positions[rows],
            weight=None if self._weight is None else self._weight[rows],
            assignment=joined,
            is_merged=self.is_merged,
            sizes=None if self.sizes is None else self.sizes[source],
            shares=None if self.shares is None else self.shares[source],
            order=None if self.order is None else self.order[rows] - rows.start,
            vectors=None if self.vectors is None else self.vectors[source],
            as_released=self.as_released,
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write everything to a safetensors file (needs ``safetensors``); an existing file is kept unless asked."""
        _file.save(self, path, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> Packed:
        """Read what ``save`` wrote. The file is not trusted: anything inconsistent in it is a ValueError."""
        return _file.load(path, device)


def as_weights(weights: Tensor | None, x: Tensor) -> Tensor | None:
    """float32 weights as ``ops.merge`` takes them with ``x``."""
    return weights.double() if weights is not None and x.dtype == torch.float64 else weights


def sum_members(assignment: Tensor, k: int, sizes: Tensor | None = None) -> Tensor:
    """float32 [k]: how many rows join each, or the sum of their sizes."""
    members, offsets = ops.group(assignment, k)
    if sizes is None:
        return offsets.diff().to(torch.float32)
    return ops.merge(sizes[:, None], members, offsets, reduce="sum")[0][:, 0]


def _through(first: Tensor, second: Tensor) -> Tensor:
    """``second`` [K, ...] at ``first``; -1 where that is."""
    if second.shape[0] == 0:
        return second.new_full((first.shape[0], *second.shape[1:]), -1)
    kept = (first >= 0).view(-1, *[1] * (second.dim() - 1))
    return torch.where(kept, second[first.clamp(min=0)], -1)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() > 1 else x[:, None]


register_tree(
    Packed,
    ["values", "index", "cu_seqlens", "layout", "scores", "counts", "longest", "is_merged",
     "_positions", "_weight", "_assignment", "sizes", "shares", "gap", "order", "vectors", "as_released"],
)  # fmt: skip
