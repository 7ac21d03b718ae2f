"""fastvid: the tokens most looked at of each frame, and dense ones of some frames, which their scene merges into."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.sites import slots_of
from vtok.units import (
    at,
    best_of,
    expect_budget,
    frame_bounds,
    frame_quotas,
    frames_of_rows,
    plan_segments,
    pulled,
    salience_of,
    share_of,
    slots,
    squashed,
    without_frames,
)  # fmt: skip
from vtok.windows import frame_means, scene_windows, starts_of, window_ends

if TYPE_CHECKING:
    from vtok.decide import Goal, Plan

WIDEST = 64  # rows that look for one centre at a time, see nearest


@register("fastvid", kind="merge")
def fastvid(
    tokens: Tensor,
    layout: Layout,
    goal: Goal,
    *,
    attention: Tensor | None = None,
    features: Tensor | None = None,
    segments: int = 8,
    similarity: float = 0.9,
    contextual: float = 0.4,
    every: int = 4,
    blend: float = 0.6,
    neighbours: int = 4,
) -> Merged:
    """Cut each video into scenes; keep of each frame what draws the most attention, and merge the rest of its scene.

    A frame's share of the budget follows from its place (of m tokens in all ⌊m·(t+1)/T⌋ - ⌊m·t/T⌋). All but the share
    ``contextual`` of it, rounded down, are its salient tokens, which stay as they are. What is left of a scene's shares
    is divided alike among its anchors, every fourth frame counted back from its last: centres of DPC-KNN among the
    other tokens of that frame. Each token that is not salient joins the centre of its scene that it is most alike, by
    cosine, or is dropped where its scene has none. Where an anchor has too few tokens for its centres more salient
    tokens fill the budget.

    Args:
        attention: [S], the attention that each token draws in the encoder, from its class token or pooling head.
            Without it a token draws some that is unlike the mean of its frame.
        features: floats [F, C], what scenes are cut by: the encoder's global feature of each frame; without it the mean
            of its tokens.
        segments, similarity: a cut is among the ``segments - 1`` least alike frames of a video or below the similarity
            (``vtok.windows.scene_windows``). 0.84 in the release for Qwen2.5-VL.
        contextual: a float is the decimal that it prints as.
        every: frames from anchor to anchor.
        blend: the share of a centre in its row besides its part in the mean of all that joined it; in [0, 1).
        neighbours: how many the density looks at, the token itself among them, in [1, 64].

    A nested budget, one number per frame, makes every frame the anchor of its own. Departs from the release in this:
    there each anchor of a scene merges the whole scene again, so that a token is in several rows, here it is in one;
    there integer division loses rows, here all of the budget is kept; densities get no noise.

    Source: the released code of FastVID. It has no threshold. Copies the tokens once or twice, without ``attention``
    several times as float32.
    """
    plan, share = expect_budget("fastvid", goal), share_of("fastvid", "contextual", contextual)
    if segments < 1 or every < 1 or not 0 <= blend < 1:
        got = f"{segments}, {every} and {blend}"
        raise ValueError(f"method 'fastvid': expected segments >= 1, every >= 1 and blend in [0, 1), got {got}")
    if features is not None and (features.dim() != 2 or features.shape[0] != layout.frames):
        raise ValueError(
            f"method 'fastvid': expected features of shape [{layout.frames}, C], got {tuple(features.shape)}"
        )
    if layout.frames == 0:
        return without_frames(goal)
    seen = frame_means(tokens, layout) if features is None else features.detach()
    scenes, bounds = scene_windows(seen, layout, segments=segments, similarity=similarity), frame_bounds(layout)
    frame, inside = frames_of_rows(layout)
    k_salient, k_centres, anchor = _quotas(scenes, bounds, layout, plan, share, every)
    salience = salience_of("fastvid", attention, tokens, layout)
    salient = best_of(salience, inside, bounds, k_salient)
    valid = inside & ~salient & anchor[frame]
    _, centres, density = ops.density_cluster(
        tokens, bounds, slots(k_centres), goal.rows, neighbours=neighbours, valid=valid
    )
    centre = slots_of(centres, layout) >= 0
    score = torch.where(centre, 2 + squashed(density), squashed(salience) + 4 * salient)
    score = score.masked_fill(layout.extra_mask(), torch.inf)
    index, cu_seqlens, counts = goal.choose(score)
    slot = slots_of(index, layout)
    centre = centre & (slot >= 0)
    into = nearest(tokens, centre, _rows_of(scenes, bounds), _rows_of_one(plan, share))
    assignment = torch.where((slot >= 0) | ~inside, slot, at(slot, into))
    shares = pulled(assignment, centre, goal.rows, blend, goal.sizes, add=True)
    return Merged(index, assignment, cu_seqlens, counts, score, shares=shares)


def _quotas(
    scenes: Tensor, bounds: Tensor, layout: Layout, plan: Plan, share: tuple[int, int], every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(int64 [F] salient tokens of each frame, int64 [F] centres, bool [F] whether it is an anchor)."""
    here, tokens = plan_segments(layout, plan), frame_quotas(layout, plan)
    centres = tokens * share[0] // share[1]
    frame = torch.arange(layout.frames, dtype=torch.int64, device=bounds.device)
    scene = starts_of((scenes == frame) | (here != here.roll(1)))
    end, so_far = window_ends(scene), slots(centres)
    anchors, back = -((scene - end) // every), end - 1 - frame
    later, whole = back // every, so_far[end] - so_far[scene]
    own = whole * (anchors - later) // anchors - whole * (anchors - later - 1) // anchors
    anchor = back % every == 0
    return tokens - centres, torch.where(anchor, own, 0), anchor


def _rows_of(windows: Tensor, bounds: Tensor) -> Tensor:
    """int64 [F+1]: where the rows of each window begin, and end; a window's other frames have none, after them."""
    frame = torch.arange(windows.shape[0], dtype=torch.int64, device=windows.device)
    begin = torch.where(windows == frame, frame, window_ends(windows))
    return torch.cat([bounds[begin], bounds[-1:]])


def _rows_of_one(plan: Plan, share: tuple[int, int]) -> int:
    """How many rows of each scene there are for each of its centres, at least."""
    if plan.on_host is None:
        return 1
    centres = [(rows, quota * share[0]) for rows, quota in plan.on_host]
    return min([WIDEST, *(rows * share[1] // count for rows, count in centres if count)])


def nearest(tokens: Tensor, centre: Tensor, groups: Tensor, each: int = 1) -> Tensor:
    """int64 [S]: the row of ``centre`` bool [S] in its group that each row is most alike, by cosine; -1 for none.

    Of equals the lower one; a row with NaN has none. Group g is rows [groups[g], groups[g+1]) and has a centre for
    ``each`` of its rows at most, rounded up.

    ``bipartite_match`` compares every (each + 1)-th row of a group with the others, so blocks are made of that many:
    some rows, and a centre; where a group has more blocks than centres they come again.
    """
    total, block = tokens.shape[0], each + 1
    listed, count = ops.compact(centre, groups, total)
    first, begin = slots(count), slots(-(-groups.diff() // each))
    place = torch.arange((total // each + count.shape[0]) * block, dtype=torch.int64, device=tokens.device)
    group = (torch.searchsorted(begin, place // block, right=True) - 1).clamp(max=count.shape[0] - 1)
    number = place // block - begin[group]
    own = groups[group] + number * each + place % block
    own = torch.where(own < groups[group + 1], own, -1)
    receiver = torch.where(count[group] > 0, at(listed, first[group] + number % count[group].clamp(min=1)), -1)
    row = torch.where(place % block < each, own, receiver)
    best, target = ops.bipartite_match(ops.pack(tokens, row), begin * block, split=block)
    row_itself = torch.arange(total, dtype=torch.int64, device=tokens.device)
    group = torch.searchsorted(groups, row_itself, right=True) - 1
    number = row_itself - groups[group]
    place = (begin[group] + number // each) * block + number % each
    return torch.where(best[place].isnan(), -1, at(row, target[place]))
