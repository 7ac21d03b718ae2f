"""Centres: which one of its group each row is most alike, and rows that are a centre and a mean in one; no sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.packed import as_weights
from vtok.units import at, slots

if TYPE_CHECKING:
    from vtok.decide import Plan

WIDEST = 64  # rows that look for one centre at a time, see nearest


def nearest(tokens: Tensor, centres: Tensor, first: Tensor, groups: Tensor, each: int = 1) -> Tensor:
    """int64 [S]: which of ``centres`` [C, D] of its group each row is most alike, by cosine; -1 for none.

    Of equals the lower one; a row with NaN has none. Group g is rows [groups[g], groups[g+1]) and the centres
    [first[g], first[g+1]), one for ``each`` of its rows at most, rounded up.

    ``bipartite_match`` compares every (each + 1)-th row of a group with the others, so blocks are made of that many:
    some rows, and a centre; where a group has more blocks than centres they come again.
    """
    total, block, count = tokens.shape[0], each + 1, first.diff()
    begin = slots(-(-groups.diff() // each))
    row = torch.arange(total, dtype=torch.int64, device=tokens.device)
    number = torch.arange(total // each + count.shape[0], dtype=torch.int64, device=tokens.device)
    group = (torch.searchsorted(begin, number, right=True) - 1).clamp(max=count.shape[0] - 1)
    number = number - begin[group]
    own = (groups[group] + number * each)[:, None] + torch.arange(block, dtype=torch.int64, device=tokens.device)
    own = torch.where(own < groups[group + 1][:, None], own, -1)
    own[:, each] = -1
    receiver = torch.where(count[group] > 0, first[group] + number % count[group].clamp(min=1), -1)
    x = ops.pack(tokens, own.flatten())
    x.view(-1, block, x.shape[1])[:, each] = ops.pack(centres, receiver)
    best, target = ops.bipartite_match(x, begin * block, split=block)
    group = torch.searchsorted(groups, row, right=True) - 1
    number = row - groups[group]
    place = (begin[group] + number // each) * block + number % each
    return torch.where(best[place].isnan(), -1, at(receiver, target[place] // block))


def rows_of_one(plan: Plan | None, share: tuple[int, int] = (1, 1)) -> int:
    """How many rows of each segment there are for each of its centres, that share of what it keeps, at least."""
    if plan is None or plan.on_host is None:
        return 1
    centres = [(rows, kept * share[0]) for rows, kept in plan.on_host]
    return min([WIDEST, *(rows * share[1] // count for rows, count in centres if count)])


def blended(
    rows: Tensor, centres: Tensor, lists: tuple[Tensor, Tensor], sizes: Tensor | None, blend: float = 0.0
) -> Tensor:
    """[K, D]: max(1 / (n + 1), ``blend``) of each of ``centres`` [K, D], the rest of the mean of the n rows listed.

    ``lists`` are members and offsets as of ``ops.merge``; a row may be in several, and n counts its size.
    """
    means, count = ops.merge(rows, *lists, as_weights(sizes, rows))
    share = (1 / (count + 1)).clamp(min=blend)[:, None]
    return (share * centres + (1 - share) * means).to(rows.dtype)
