"""scissor: connected components of alike tokens, of each frame first, then of what is left, over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.centres import blended, nearest, rows_of_one
from vtok.forest import before, joined, likeness, ranked
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.packed import as_weights
from vtok.sites import slots_of

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("scissor", kind="merge")
def scissor(
    tokens: Tensor, layout: Layout, goal: Goal, *, similarity: float = 0.9, compat: str | None = None
) -> Merged:
    """Merge what a chain of alike tokens connects, in each frame, and then the means of that over the whole video.

    Tokens of a frame are linked where their cosine is above the threshold, strictly; the means of their components are
    linked likewise, whichever frames they are of, and the components of those are the rows.

    Under a budget of K rows the same components are made with ``similarity``, and then exactly K of them. Where they
    are too many, those go whose first token is most like the one before it (at its site one frame earlier, in the first
    frame the one before it in reading order), and join what that belongs to. Where they are too few, components of a
    frame come to stand by themselves, then single tokens, the least like the token before them first.

    Args:
        similarity: under a budget, the cosine above which tokens are linked; 0.9 in the release's settings, 0.95 in its
            code. Under a threshold that is it.
        compat: "scissor" for the values of the release: a component over time is the mean of its parts' means, whatever
            their size; then every token goes to the most similar component of its video, and a row is (that mean + the
            sum of the n tokens that came) / (n + 1). ``assignment`` says where a token went, but a row's first token
            always stands for its own.

    A row is the mean of all its tokens, at the first of them. Departs from the release in the two points of ``compat``;
    in components of some random rows where there are thousands; and in the order of rows, here that of their first
    tokens, there of those with the most links.

    Holds one copy of the tokens meanwhile; with ``compat`` up to three, and under a threshold it takes the cosine of
    each two tokens of a video. Source: the released code of LLaVA-Scissor.
    """
    if compat not in (None, "scissor"):
        raise ValueError(f"method 'scissor': expected compat None or 'scissor', got {compat!r}")
    above = goal.threshold if goal.plan is None else similarity
    row = torch.arange(layout.total, dtype=torch.int64, device=tokens.device)
    part, first = components(tokens, layout, above, goal.sizes)
    opens = first == row
    alike = likeness(tokens, layout)
    earlier, _ = before(layout, part)
    ends = row if goal.plan is None else earlier  # a component that there is no room for is dropped whole
    into = torch.where(part != row, part, torch.where(opens, ends, first))
    score = ranked(alike, opens, part == row, alike)
    index, cu_seqlens, counts = goal.choose(score, opens)
    assignment = joined(into, index, layout)
    if compat is None:
        return Merged(index, assignment, cu_seqlens, counts, score)
    slot = slots_of(index, layout)
    piece = torch.where(slot >= 0, row, part)
    owner = torch.where(piece == row, assignment, -1)

    def survivors(rows: Tensor) -> Tensor:
        """[K, D]: of each output row the mean of its pieces' means."""
        means, _ = ops.merge(rows, *ops.group(piece, layout.total), as_weights(goal.sizes, rows))
        return ops.merge(means, *ops.group(owner, goal.rows))[0]

    grids = _and_extra(layout.cu_seqlens[:-1], layout)
    begin = torch.searchsorted(torch.where(index < 0, layout.total, index), grids)
    near = nearest(tokens, survivors(tokens), begin, grids, rows_of_one(goal.plan))
    went = torch.where(near < 0, assignment, near)
    lists = ops.group(torch.where(layout.extra_mask(), -1, went), goal.rows)

    def values(rows: Tensor) -> Tensor:
        return blended(rows, survivors(rows), lists, goal.sizes)

    return Merged(index, torch.where(slot >= 0, slot, went), cu_seqlens, counts, score, values=values)


def components(tokens: Tensor, layout: Layout, above: float, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 [S] each: the first row of the component of its frame that each row is in, and of that of the video."""
    row = torch.arange(layout.total, dtype=torch.int64, device=tokens.device)
    extra = layout.extra_mask()
    frames = _and_extra(layout.frame_starts()[0], layout)
    part = torch.where(extra, row, ops.similarity_components(tokens, frames, above))
    # As many as the device finds, in room for all: what is beyond the last video's is passed over.
    survivors, counts = ops.compact((part == row) & ~extra, layout.cu_seqlens, layout.total)
    slot = slots_of(survivors, layout)[part]
    exact = None if sizes is None else sizes.to(torch.float64 if tokens.dtype == torch.float64 else torch.float32)
    means, _ = ops.merge(tokens, *ops.group(slot, layout.total), exact)
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    first = survivors[ops.similarity_components(means, bounds, above).clamp(min=0)]
    return part, torch.where(extra, row, first[slot])


def _and_extra(starts: Tensor, layout: Layout) -> Tensor:
    """int64: ``starts`` of frames or grids, and where the rows after each grid begin, in order, and where all end."""
    if layout.extra_rows:
        starts, _ = torch.cat([starts, layout.cu_seqlens[1:] - layout.extra_rows]).sort()
    return torch.cat([starts, layout.cu_seqlens[-1:]])
