"""sttm: alike tokens of a frame become nodes of a quadtree, and alike nodes of neighbouring frames become one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.forest import before, joined, likeness, ranked
from vtok.layout import Layout
from vtok.methods import Merged, register

if TYPE_CHECKING:
    from vtok.decide import Goal

TEMPORAL = 0.65  # the least cosine of nodes that are linked, under a budget


@register("sttm", kind="merge")
def sttm(
    tokens: Tensor,
    layout: Layout,
    goal: Goal,
    *,
    tree: float = 0.85,
    temporal: float | None = None,
    compat: str | None = None,
) -> Merged:
    """Merge in space, then in time: quadtree nodes of each frame, and what a chain of alike nodes connects.

    Each frame is a pyramid of means of two by two cells, up to where no side is over two cells; an odd side keeps its
    first row or column apart. From the top a cell whose children all have a cosine to it of at least ``tree`` is a
    node; else its children are looked at, and tokens are nodes. Nodes of consecutive frames of which one covers the
    other's box are linked where their cosine is not below the threshold; the components of the links are the rows.

    Under a budget of K rows the same components are made with ``temporal``, and then exactly K of them. Where they are
    too many, those go whose first node is most like the node before it (at its place one frame earlier, in the first
    frame the one before it in reading order), and join what that belongs to. Where they are too few, nodes come to
    stand by themselves, the least like the one before them first, then single tokens, the least like their two by two.

    Args:
        tree: the least cosine of a node's children to it; the release uses 0.80 and 0.85.
        temporal: under a budget, the least cosine of linked nodes; the release uses 0.50 to 0.65, 0.65 is the default.
            Under a threshold that is it.
        compat: "sttm" for the release. It compares a cell at the odd border also with the first cell of its frame, so
            that it splits more often than the rule says; and every node counts alike in a row, and every cell in the
            one above it, however many tokens they have (``Packed.shares``).

    A row is the mean of all its tokens, at its first node's top left token. Departs from the release, but for
    ``compat``, in this: it finds the true components, where the release's search stops early and leaves more rows; and
    every token counts alike. Nodes are compared by means that are rounded to the tokens' dtype.

    Holds two to three copies of the tokens meanwhile. Inside a graph the height of the pyramid has to be known: dense
    tokens. Source: the released code of STTM.
    """
    if compat not in (None, "sttm"):
        raise ValueError(f"method 'sttm': expected compat None or 'sttm', got {compat!r}")
    if goal.plan is None and temporal is not None:
        raise ValueError(f"method 'sttm': expected temporal under a budget, got {temporal} under a threshold")
    least = goal.threshold if goal.plan is None else TEMPORAL if temporal is None else temporal
    node, values, within, shares = quadtree(tokens, layout, tree, compat)
    row = torch.arange(layout.total, dtype=torch.int64, device=tokens.device)
    alike = likeness(values, layout)
    earlier, later = before(layout, node)
    linked = later & (alike >= least)
    first = ops.connected_components(torch.where(linked, node, -1), earlier, layout.total)
    opens = (node == row) & (first == row)
    ends = row if goal.plan is None else earlier  # a component that there is no room for is dropped whole
    into = torch.where(node != row, node, torch.where(opens, ends, torch.where(linked, earlier, first)))
    score = ranked(alike, opens, node == row, within)
    index, cu_seqlens, counts = goal.choose(score, opens)
    if shares is not None and goal.sizes is not None:
        shares = shares * goal.sizes
    return Merged(index, joined(into, index, layout), cu_seqlens, counts, score, shares=shares)


def quadtree(
    tokens: Tensor, layout: Layout, tree: float, compat: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The nodes of all frames.

    Returns:
        int64 [S], the row at the top left of the node that each row is in; [S, D], the mean of that node; float32 [S],
        the cosine of each row to the mean of its two by two, 1 where it is in none; and float32 [S], the part of each
        row in that mean, or None without ``compat``.
    """
    levels, likenesses, bounds = _pyramid(tokens, layout), [], [0]
    for level in levels:
        bounds.append(bounds[-1] + level.values.shape[0])
    nodes: list[Tensor | None] = [None]
    for below, level in pairwise(levels):
        alike = _cosines(below.values, ops.pack(level.values, below.parent))
        likenesses.append(alike)
        splits = _mark(below.parent, (below.parent >= 0) & ~(alike >= tree), level.values.shape[0])
        if compat:
            alike = _cosines(level.values, ops.pack(below.values, level.frame_start))
            splits = splits | ((level.children < 4) & ~(alike >= tree))
        nodes.append(~splits)
    covers = shares = None  # the cell of all levels that each cell of a level is in, or -1; its part in that
    for at in reversed(range(len(levels))):
        own = torch.arange(bounds[at], bounds[at + 1], dtype=torch.int64, device=tokens.device)
        if (whole := nodes[at]) is not None:
            own = torch.where(whole, own, -1)
        if covers is not None:
            above = torch.nn.functional.pad(covers, (0, 1), value=-1)[levels[at].parent]  # -1 for no parent
            own = torch.where(above >= 0, above, own)
        if compat:
            part = torch.ones_like(own, dtype=torch.float32)
            if shares is not None:
                each = torch.nn.functional.pad(shares / levels[at + 1].children, (0, 1))[levels[at].parent]
                part = torch.where(above >= 0, each, part)
            shares = part
        covers = own
    values = ops.pack(torch.cat([level.values for level in levels]), covers)
    within = likenesses[0].float() if likenesses else torch.ones(layout.total, device=tokens.device)
    return torch.cat([level.top for level in levels])[covers], values, within, shares


@dataclass
class _Level:
    """The cells of one level of the pyramid, (video, t, y, x) in order; level 0 has extra rows too."""

    values: Tensor  # [n, D]
    top: Tensor  # int64 [n], the row at the top left
    parent: Tensor  # int64 [n], the cell of the next level, -1 for none
    children: Tensor  # int64 [n], cells of the level below in it
    frame_start: Tensor  # int64 [n], the first cell of its frame one level below


def _pyramid(tokens: Tensor, layout: Layout) -> list[_Level]:
    start, frames, w = layout.cu_seqlens, layout.cu_frames.diff(), layout.width
    h = layout.tokens_per_frame // w
    row = torch.arange(layout.total, dtype=torch.int64, device=tokens.device)
    levels = [_Level(tokens, row, torch.full_like(row, -1), torch.zeros_like(row), row)]
    for cells in _sizes(layout):
        level, goes_on, high, wide = levels[-1], (torch.maximum(h, w) > 2) & (h * w > 0), (h + 1) // 2, (w + 1) // 2
        next_start = torch.nn.functional.pad(torch.where(goes_on, frames * high * wide, 0).cumsum(0), (1, 0))
        cell = torch.arange(level.top.shape[0], dtype=torch.int64, device=tokens.device)
        video = (torch.searchsorted(start, cell, right=True) - 1).clamp(max=layout.videos - 1)
        t, site = _split(cell - start[video], (h * w)[video])
        y, x = _split(site, w[video])
        y, x = (y + h[video] % 2) // 2, (x + w[video] % 2) // 2
        parent = next_start[video] + (t * high[video] + y) * wide[video] + x
        level.parent = torch.where(goes_on[video] & (t < frames[video]), parent, -1)
        members, offsets = ops.group(level.parent, cells)
        child = members[offsets[:-1]]  # the first one of each cell
        values, _ = ops.merge(level.values, members, offsets)
        levels.append(
            _Level(values, level.top[child], torch.full_like(child, -1), offsets.diff(), (cell - site)[child])
        )
        start, h, w = next_start, high, wide
    return levels


def _sizes(layout: Layout) -> list[int]:
    """Cells of all frames together on each level above the tokens."""
    if layout.grid_of_each is None and torch.compiler.is_compiling():
        raise ValueError("method 'sttm': expected dense tokens inside a graph, got a Layout of videos that may differ")
    alike = layout.grid_of_each is not None
    grids = [layout.grid_of_each] if layout.grid_of_each is not None else layout.grids
    sizes = []
    while grids := [(t, (h + 1) // 2, (w + 1) // 2) for t, h, w in grids if h > 2 or w > 2]:
        sizes.append(sum(t * h * w for t, h, w in grids) * (layout.videos if alike else 1))
    return sizes


def _split(x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    by = by.clamp(min=1)
    return x // by, x % by


def _mark(where: Tensor, which: Tensor, count: int) -> Tensor:
    """bool [count]: the places that ``where`` names in the rows of ``which``."""
    spare = torch.zeros(count + 1, dtype=torch.bool, device=where.device)  # the last one takes the others
    return spare.index_fill(0, torch.where(which, where, count), True)[:-1]


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """float32 or float64 [n]: row by row of two [n, D], as two frames of one video."""
    count = a.shape[0]
    bounds = torch.arange(2, dtype=torch.int64, device=a.device) * (2 * count)
    return ops.temporal_similarity(torch.cat([a, b]), bounds, bounds[1:] // 2)[count:]
