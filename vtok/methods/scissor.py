"""scissor: connected components of alike tokens, of each frame first, then of what is left, over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.forest import before, joined, likeness, ranked
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.sites import slots_of

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("scissor", kind="merge")
def scissor(tokens: Tensor, layout: Layout, goal: Goal, *, similarity: float = 0.9) -> Merged:
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

    A row is the mean of all its tokens, at the first of them. Departs from the release in this: its components are
    those of some random rows where there are thousands; it averages means whatever their size; and in the end it hands
    every token to the most similar of the means, which it adds to them. ``released`` does the last two.

    Holds one copy of the tokens meanwhile. Source: the released code of LLaVA-Scissor.
    """
    above = goal.threshold if goal.plan is None else similarity
    row = torch.arange(layout.total, dtype=torch.int64, device=tokens.device)
    part, first = components(tokens, layout, above, goal.sizes)
    opens = first == row
    alike = likeness(tokens, layout)
    earlier, _ = before(layout, part)
    into = torch.where(part != row, part, torch.where(opens, earlier, first))
    score = ranked(alike, opens, part == row, alike)
    index, cu_seqlens, counts = goal.choose(score, opens)
    return Merged(index, joined(into, index, layout), cu_seqlens, counts, score)


def components(tokens: Tensor, layout: Layout, above: float, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 [S] each: the first row of the component of its frame that each row is in, and of that of the video."""
    row = torch.arange(layout.total, dtype=torch.int64, device=tokens.device)
    extra = layout.extra_mask()
    part = torch.where(extra, row, ops.similarity_components(tokens, _frames(layout), above))
    # As many as the device finds, in room for all: what is beyond the last video's is passed over.
    survivors, counts = ops.compact((part == row) & ~extra, layout.cu_seqlens, layout.total)
    slot = slots_of(survivors, layout)[part]
    exact = None if sizes is None else sizes.to(torch.float64 if tokens.dtype == torch.float64 else torch.float32)
    means, _ = ops.merge(tokens, *ops.group(slot, layout.total), exact)
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    first = survivors[ops.similarity_components(means, bounds, above).clamp(min=0)]
    return part, torch.where(extra, row, first[slot])


def _frames(layout: Layout) -> Tensor:
    """int64: where each frame starts, and the rows after each grid, and where all end."""
    starts, _ = layout.frame_starts()
    if layout.extra_rows:
        starts, _ = torch.cat([starts, layout.cu_seqlens[1:] - layout.extra_rows]).sort()
    return torch.cat([starts, layout.cu_seqlens[-1:]])


def released(tokens: Tensor, similarity: float) -> tuple[Tensor, Tensor]:
    """The release's rows of one video [T, n, D], all components exact and in order of their first token; it waits.

    Returns:
        [K, D] in the tokens' dtype, (mean of the component's means + all tokens that are most like that) / (their
        number + 1); int64 [T·n], which row each token is most like, the lowest of equals.
    """
    steps, sites, _ = tokens.shape
    layout, x = Layout.uniform(1, steps, 1, sites, device=tokens.device), tokens.flatten(0, 1)
    part, first = components(x, layout, similarity, None)
    means, _ = ops.merge(x, *_classes(part))
    kept = part.unique()
    survivors, _ = ops.merge(means, *_classes(first[kept]))
    unit = torch.nn.functional.normalize(survivors.float(), dim=-1)
    nearest = torch.cat([(some.float() @ unit.T).argmax(-1) for some in x.split(1024)])
    ends = torch.arange(len(survivors), device=x.device)
    return ops.merge(torch.cat([survivors, x]), *ops.group(torch.cat([ends, nearest]), len(survivors)))[0], nearest


def _classes(label: Tensor) -> tuple[Tensor, Tensor]:
    """``group`` of rows by equal labels, the lowest label first."""
    labels, number = label.unique(return_inverse=True)
    return ops.group(number, len(labels))
