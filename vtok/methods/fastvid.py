"""fastvid: the tokens most looked at of each frame, and dense ones of some frames, which their scene merges into."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok import ops
from vtok.centres import blended, nearest, rows_of_one
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
    compat: str | None = None,
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
        compat: "fastvid" for the values of the release, in which a token is in several rows: each anchor of a scene
            merges the whole scene again, into its own centres. A centre's share of its row is max(1 / (n + 1),
            ``blend``), the rest is the mean of the n tokens that are more like it than the anchor's other centres. The
            anchors of a scene have equally many centres; what that leaves of the budget goes to more salient tokens,
            which are merged nonetheless. ``assignment`` names one row of each token, the most alike of its scene.

    A nested budget, one number per frame, makes every frame the anchor of its own (with ``compat`` also a scene of its
    own). Departs from the release in this: a token is in one row, unless ``compat`` says otherwise; all of the budget
    is kept, where integer division loses rows there; densities get no noise.

    Source: the released code of FastVID. It has no threshold. Copies the tokens once or twice, without ``attention``
    several times as float32; with ``compat`` ⌈T / every⌉ times, one after the other, and holds up to 32·⌈T / every⌉
    bytes a row.
    """
    plan, share = expect_budget("fastvid", goal), share_of("fastvid", "contextual", contextual)
    if segments < 1 or every < 1 or not 0 <= blend < 1:
        got = f"{segments}, {every} and {blend}"
        raise ValueError(f"method 'fastvid': expected segments >= 1, every >= 1 and blend in [0, 1), got {got}")
    if compat not in (None, "fastvid"):
        raise ValueError(f"method 'fastvid': expected compat None or 'fastvid', got {compat!r}")
    if features is not None and (features.dim() != 2 or features.shape[0] != layout.frames):
        raise ValueError(
            f"method 'fastvid': expected features of shape [{layout.frames}, C], got {tuple(features.shape)}"
        )
    if layout.frames == 0:
        return without_frames(goal)
    seen = frame_means(tokens, layout) if features is None else features.detach()
    scenes, bounds = scene_windows(seen, layout, segments=segments, similarity=similarity), frame_bounds(layout)
    frame, inside = frames_of_rows(layout)
    scene, anchor = _anchors(scenes, layout, plan, every)
    k_salient, k_centres = _quotas(scene, anchor, layout, plan, share, every, alike=compat is not None)
    salience = salience_of("fastvid", attention, tokens, layout)
    salient = best_of(salience, inside, bounds, k_salient)
    valid = inside & ~salient & (anchor >= 0)[frame]
    _, centres, density = ops.density_cluster(
        tokens, bounds, slots(k_centres), goal.rows, neighbours=neighbours, valid=valid
    )
    centre = slots_of(centres, layout) >= 0
    score = torch.where(centre, 2 + squashed(density), squashed(salience) + 4 * salient)
    score = score.masked_fill(layout.extra_mask(), torch.inf)
    index, cu_seqlens, counts = goal.choose(score)
    slot = slots_of(index, layout)
    centre = centre & (slot >= 0)
    groups, each = _rows_of(scenes if compat is None else scene, bounds), rows_of_one(plan, share)
    into = _nearest_row(tokens, centre, groups, goal.rows, each)
    assignment = torch.where((slot >= 0) | ~inside, slot, at(slot, into))
    if compat is None:
        shares = pulled(assignment, centre, goal.rows, blend, goal.sizes, add=True)
        return Merged(index, assignment, cu_seqlens, counts, score, shares=shares)
    number = torch.where(centre, anchor[frame], -1)
    joined = torch.ops.vtok.nearest_of_each(tokens, number, groups, goal.rows, each, -(-layout.longest // every))
    members, offsets = ops.group(at(slot, joined.masked_fill(~inside | salient, -1)).flatten(), goal.rows)
    lists = members % torch.sym_max(layout.total, 1), offsets

    def values(rows: Tensor) -> Tensor:
        return blended(rows, ops.pack(rows, index), lists, goal.sizes, blend)

    return Merged(index, assignment, cu_seqlens, counts, score, values=values)


def _anchors(scenes: Tensor, layout: Layout, plan: Plan, every: int) -> tuple[Tensor, Tensor]:
    """(int64 [F] the scenes, cut where a nested budget is; int64 [F] which anchor each frame is, from the last back).

    -1 for a frame that is no anchor.
    """
    frame, here = torch.arange(layout.frames, dtype=torch.int64, device=scenes.device), plan_segments(layout, plan)
    scene = starts_of((scenes == frame) | (here != here.roll(1)))
    back = window_ends(scene) - 1 - frame
    return scene, torch.where(back % every == 0, back // every, -1)


def _quotas(
    scene: Tensor, anchor: Tensor, layout: Layout, plan: Plan, share: tuple[int, int], every: int, *, alike: bool
) -> tuple[Tensor, Tensor]:
    """(int64 [F] salient tokens of each frame, int64 [F] centres, equally many in all anchors of a scene if alike)."""
    tokens, end = frame_quotas(layout, plan), window_ends(scene)
    centres = tokens * share[0] // share[1]
    so_far, anchors = slots(centres), -((scene - end) // every)
    whole = so_far[end] - so_far[scene]
    own = whole * (anchors - anchor) // anchors - whole * (anchors - anchor - 1) // anchors
    return tokens - centres, torch.where(anchor >= 0, whole // anchors if alike else own, 0)


def _rows_of(windows: Tensor, bounds: Tensor) -> Tensor:
    """int64 [F+1]: where the rows of each window begin, and end; a window's other frames have none, after them."""
    frame = torch.arange(windows.shape[0], dtype=torch.int64, device=windows.device)
    begin = torch.where(windows == frame, frame, window_ends(windows))
    return torch.cat([bounds[begin], bounds[-1:]])


def _nearest_row(tokens: Tensor, centre: Tensor, groups: Tensor, k: int, each: int) -> Tensor:
    """int64 [S]: the row of its group in ``centre`` bool [S], k at most, that each row is most alike; -1 for none."""
    listed, count = ops.compact(centre, groups, k)
    return at(listed, nearest(tokens, ops.pack(tokens, listed), slots(count), groups, each))


@torch.library.custom_op("vtok::nearest_of_each", mutates_args=())
def nearest_of_each(tokens: Tensor, number: Tensor, groups: Tensor, k: int, each: int, anchors: int) -> Tensor:
    """int64 [anchors, S]: the row of each anchor's centres that each row is most alike; ``number`` int64 [S] is whose
    centre a row is, or -1. A graph knows the number of anchors as a symbol, over which it could not loop."""
    found = [_nearest_row(tokens, number == a, groups, k, each) for a in range(anchors)]
    return torch.stack(found) if found else number.new_empty(0, number.shape[0])


@nearest_of_each.register_fake
def _(tokens: Tensor, number: Tensor, groups: Tensor, k: int, each: int, anchors: int) -> Tensor:
    return number.new_empty(anchors, number.shape[0])
