"""Along time at each site of a batch: what was kept last, what comes next. Index space alone, without a sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.layout import Layout


@dataclass(frozen=True)
class _Columns:
    """The rows sorted by site, then time, some of them marked."""

    order: Tensor  # int64 [S], 0, 1, 2, ...
    slot: Tensor  # int64 [S], where each row stands
    first: Tensor  # int64 [S], where its site begins
    end: Tensor  # int64 [S], and ends
    mark: Tensor  # int64 [S], by slot: what the row there is marked with, or -1

    @staticmethod
    def of(layout: Layout, marks: Tensor, stride: int = 1) -> _Columns:
        """``marks`` int64 [S], by row."""
        slot, first, count = layout.columns(stride)
        order = torch.arange(layout.total, dtype=torch.int64, device=marks.device)
        return _Columns(order, slot, first, first + count, torch.empty_like(order).scatter(0, slot, marks))

    def last(self) -> Tensor:
        """int64 [S], by slot: the last marked slot up to there, of any site, or -1."""
        return torch.where(self.mark >= 0, self.order, -1).cummax(0).values

    def next(self) -> Tensor:
        """int64 [S], by slot: the next marked slot from there, of any site, or S."""
        return torch.where(self.mark >= 0, self.order, self.order.shape[0]).flip(0).cummin(0).values.flip(0)


def runs(index: Tensor, layout: Layout, stride: int = 1, opens: Tensor | None = None) -> Tensor:
    """int64 [S]: for each row which of the kept rows ``index`` [K] is the last at its site up to it; -1 before any.

    With a stride only every so many frames are looked at. Rows in ``opens`` bool [S] end the run before them whether
    they are kept or not: what follows one that is not is of none, -1.
    """
    if layout.total == 0:
        return torch.zeros_like(layout.cu_seqlens[:0])
    marks, lost = slots_of(index, layout), index.shape[0]
    if opens is not None:
        marks = torch.where(opens & (marks < 0), lost, marks)
    columns = _Columns.of(layout, marks, stride)
    last = columns.last()[columns.slot]
    found = torch.where(last >= columns.first, columns.mark[last.clamp(min=0)], -1)
    return torch.where(found == lost, -1, found)


def steps_since(marked: Tensor, layout: Layout) -> Tensor:
    """int64 [S]: steps of each row since the last marked one at its site (bool [S]), which each site begins with."""
    if layout.total == 0:
        return torch.zeros_like(layout.cu_seqlens[:0])
    columns = _Columns.of(layout, torch.where(marked, 0, -1))
    return columns.slot - columns.last()[columns.slot]


def held(assignment: Tensor, layout: Layout) -> Tensor:
    """``assignment`` int64 [S] with each -1 replaced by the last one at its site, before the first by that one."""
    if layout.total == 0:
        return assignment
    columns = _Columns.of(layout, assignment)
    last, after = columns.last()[columns.slot], columns.next()[columns.slot]
    source = torch.where(last >= columns.first, last, torch.where(after < columns.end, after, -1))
    return torch.where(source >= 0, columns.mark[source.clamp(min=0)], -1)


def kept_before(index: Tensor, layout: Layout) -> Tensor:
    """int64 [K]: the row kept before each kept row at its site; -1 where there is none, and for padding."""
    if layout.total == 0:
        return torch.full_like(index, -1)
    columns, place = _Columns.of(layout, slots_of(index, layout)), index.clamp(min=0)
    own = columns.slot[place]
    before = torch.where(own > 0, columns.last()[(own - 1).clamp(min=0)], -1)
    found = (index >= 0) & (before >= columns.first[place])
    return torch.where(found, index[columns.mark[before.clamp(min=0)].clamp(min=0)], -1)


def until_next(index: Tensor, layout: Layout) -> Tensor:
    """int64 [K]: steps from each kept row to the next one at its site, or to the end of its video; 0 for padding."""
    if layout.total == 0:
        return torch.zeros_like(index)
    columns, place = _Columns.of(layout, slots_of(index, layout)), index.clamp(min=0)
    own, end = columns.slot[place], columns.end[place]
    following = torch.nn.functional.pad(columns.next()[1:], (0, 1), value=layout.total)[own]
    return torch.where(index >= 0, torch.minimum(following, end) - own, 0)


def slots_of(index: Tensor, layout: Layout) -> Tensor:
    """int64 [S]: which of the kept rows ``index`` each row is, or -1."""
    slots = torch.arange(index.shape[0], dtype=torch.int64, device=index.device)
    spare = index.new_full((layout.total + 1,), -1)  # the last one takes the padding
    return spare.scatter(0, torch.where(index < 0, layout.total, index), slots)[:-1]
