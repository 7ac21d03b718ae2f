"""flashvid: tokens of each frame that lie far apart, and clusters of what is left once it is merged along time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtok import ops
from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.packed import as_weights, sum_members
from vtok.units import (
    LARGEST,
    Units,
    at,
    best_of,
    expect_budget,
    frame_bounds,
    frame_quotas,
    frames_of_rows,
    merge_units,
    salience_of,
    share_of,
    slots,
    without_frames,
)
from vtok.windows import frame_means, scene_windows

if TYPE_CHECKING:
    from vtok.decide import Goal, Plan


@register("flashvid", kind="merge")
def flashvid(
    tokens: Tensor,
    layout: Layout,
    goal: Goal,
    *,
    attention: Tensor | None = None,
    segments: int = 8,
    similarity: float = 0.9,
    selected: float = 0.7,
    temporal: float = 0.8,
    neighbours: int = 7,
    compat: str | None = None,
) -> Merged:
    """Cut each video into scenes; keep of each frame tokens that matter and differ, and merge the rest over time first.

    A frame's share of the budget follows from its place (of m tokens in all ⌊m·(t+1)/T⌋ - ⌊m·t/T⌋). The share
    ``selected`` of it, rounded up, goes to tokens that stay as they are (ADTS, see ``spread``): each is the farthest
    from those before it, where a distance is 1 - cosine times the attention that the token draws times its relevance,
    the dot product with the mean of its scene. Each other token joins the one of the frame before that it is most alike
    by cosine, of those not selected either and of its scene, if that is above ``temporal`` (strictly); what a chain of
    these links holds together is one group, which stands at the first of them (TAM). Each frame's groups cluster by
    DPC-KNN, in proportion to how many the video has, into what is left of the budget. Where fewer groups are left than
    that, the links of the least alike are cut first.

    Args:
        attention: [S], the attention that each token draws in the encoder; without it all draw the same.
        segments, similarity: a cut is among the ``segments - 1`` least alike frames of a video or below the similarity
            of the frames' means (``vtok.windows.scene_windows``).
        selected: the release's alpha; a float is the decimal that it prints as.
        temporal: at least 0; at 1 nothing links.
        neighbours: how many the density looks at, the token itself among them, in [1, 64].
        compat: "flashvid" for the means of the release: a chain adds the sum that a token carries but counts it as one,
            so that 1, 2 and 4 have the mean 3.5, not 7/3, and a row is the mean of its chains whatever their length.

    A row is the mean of all its tokens, whichever chains brought them, unless ``compat`` says otherwise. Departs from
    the release in that, and in this: there a scene of one frame clusters its selected tokens again, here nothing is
    used twice; its counts are rounded up, here exactly the budget is kept; the groups of a whole video, not of a scene,
    share what the selected tokens leave; densities get no noise, and look at 7 neighbours even where a frame has fewer
    clusters. A group whose frame has no cluster is dropped.

    Source: the released code of FlashVID. It has no threshold. Copies the tokens several times, also as float32; what
    else ``spread`` needs are 4·n bytes for each row, n the sites of the largest frame.
    """
    plan, share = expect_budget("flashvid", goal), share_of("flashvid", "selected", selected)
    if segments < 1 or not temporal >= 0:
        raise ValueError(f"method 'flashvid': expected segments >= 1 and temporal >= 0, got {segments} and {temporal}")
    if compat not in (None, "flashvid"):
        raise ValueError(f"method 'flashvid': expected compat None or 'flashvid', got {compat!r}")
    drawn = None if attention is None else salience_of("flashvid", attention, tokens, layout)
    if layout.frames == 0:
        return without_frames(goal)
    x = tokens.detach()
    scenes = scene_windows(frame_means(x, layout), layout, segments=segments, similarity=similarity)
    weight = _relevance(x, scenes, layout)
    weight = weight if drawn is None else drawn * weight
    k = -(-frame_quotas(layout, plan) * share[0] // share[1])
    chosen = spread(x, weight, layout, k, *_at_most(layout, plan, share))
    free = frames_of_rows(layout)[1] & ~chosen
    link, alike = _links(x, scenes, free, layout)
    link = torch.where(alike > temporal, link, -1)
    row = torch.arange(layout.total, dtype=torch.int64, device=tokens.device)
    cut = best_of(-alike, link >= 0, plan.segments, _missing(plan, chosen | free & (link < 0)))
    link = torch.where(cut, -1, link)
    head = ops.connected_components(row, link, layout.total)
    groups = Units(layout, head, free & (head == row), torch.zeros_like(free))
    quotas, _ = groups.quotas(plan, chosen)
    units = Units(layout, head, groups.static, chosen)
    return merge_units(
        tokens, goal, units, (quotas, k), weight, contextual=(0, 1), neighbours=neighbours,
        unit_values=partial(_chain_values, link=link, sizes=goal.sizes) if compat else None,
    )  # fmt: skip


def spread(x: Tensor, weight: Tensor, layout: Layout, k: Tensor, steps: int, widest: int) -> Tensor:
    """bool [S]: ``k`` int64 [F] tokens of each frame that lie far apart, taken one after the other.

    The distance from token i to j of a frame is (1 - cosine)·weight_j. The first is the token whose second smallest
    distance, its own 0 among them, is largest; then each time the one is taken whose smallest distance to those taken
    is largest. Ties to the lower row; tokens with NaN come last; a zero row is as far from others as an orthogonal one.

    Args:
        x: floats [S, D]. weight: float32 [S].
        steps: what no k is above. widest: what no frame has more sites than.

    Holds a frame's distances of all pairs, 4·widest bytes for each row, and takes ``steps`` steps, for all frames at
    once. 1 - cosine is half the squared distance of unit vectors, the same for a pair wherever it stands.
    """
    return torch.ops.vtok.spread(x, weight, *layout.frame_starts(), k, steps, widest)


@torch.library.custom_op("vtok::spread", mutates_args=())
def _spread(x: Tensor, weight: Tensor, first: Tensor, sites: Tensor, k: Tensor, steps: int, widest: int) -> Tensor:
    kept = torch.zeros(x.shape[0] + 1, dtype=torch.bool, device=x.device)  # the last one takes the padding
    if x.shape[0] == 0 or min(steps, widest) < 1:
        return kept[:-1]
    site = torch.arange(widest, dtype=torch.int64, device=x.device)
    real = site < sites[:, None]
    row = torch.where(real, first[:, None] + site, x.shape[0])
    place = row.clamp(max=x.shape[0] - 1)
    unit = normalize(x[place].float(), dim=-1)
    zero = ~unit.any(-1)
    far = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").square_()
    far = far.add_(zero[:, :, None] ^ zero[:, None, :]).mul_(0.5 * weight[place][:, None, :])
    lost = far.diagonal(dim1=1, dim2=2).isnan()  # what has no distance to itself comes last
    far.masked_fill_(far.isnan() | ~real[:, :, None], LARGEST)
    least = far.topk(min(2, widest), dim=1, largest=False).values[:, -1].masked_fill(lost, -LARGEST)
    taken = ~real
    for step in range(steps):
        pick = least.masked_fill(taken, -torch.inf).argmax(1, keepdim=True)
        taken = taken | (site == pick) & (step < k[:, None])
        near = far.gather(1, pick[:, :, None].expand(-1, 1, widest))[:, 0].masked_fill(lost, -LARGEST)
        least = torch.minimum(least, near) if step else near
    return kept.index_fill_(0, torch.where(taken & real, row, x.shape[0]).flatten(), True)[:-1].clone()


@_spread.register_fake
def _(x: Tensor, weight: Tensor, first: Tensor, sites: Tensor, k: Tensor, steps: int, widest: int) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.bool)


def _relevance(x: Tensor, scenes: Tensor, layout: Layout) -> Tensor:
    """float32 [S]: the dot product of each row with the mean of its scene, of the rows that are finite."""
    frame, inside = frames_of_rows(layout)
    scene, wide = scenes[frame], x.to(torch.float32)
    counts = inside & wide.isfinite().all(-1)
    means, _ = ops.merge(wide, *ops.group(torch.where(counts, scene, -1), layout.frames))
    return (wide * means[scene]).sum(-1)


def _links(x: Tensor, scenes: Tensor, free: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(int64 [S] the row of ``free`` in the frame before that each such row is most alike, or -1; its cosine [S]).

    Two rows are packed for each: itself, which looks, and that of its site in the frame before, which is looked at.
    """
    row = torch.arange(layout.total, dtype=torch.int64, device=x.device)
    frame, inside = frames_of_rows(layout)
    before = (row - layout.tokens_per_frame[layout.video_of(row)]).clamp(min=0)
    before = torch.where(inside & (scenes[frame] < frame) & free[before], before, -1)
    both = torch.stack([torch.where(free, row, -1), before], -1).flatten()
    best, target = ops.bipartite_match(ops.pack(x, both), frame_bounds(layout) * 2)
    link = at(both, target[::2])
    return torch.where(free, link, -1), best[::2]


def _chain_values(rows: Tensor, head: Tensor, link: Tensor, sizes: Tensor | None) -> Tensor:
    """[S, D], the release's: at each head the sum of its chain over the number of tokens that are it or link to it."""
    row = torch.arange(rows.shape[0], dtype=torch.int64, device=rows.device)
    means, whole = ops.merge(rows, *ops.group(head, rows.shape[0]), as_weights(sizes, rows))
    counted = sum_members(torch.where((row == head) | (link == head), head, -1), rows.shape[0], sizes)
    return (means * torch.where(counted > 0, whole / counted, 1)[:, None]).to(rows.dtype)


def _missing(plan: Plan, rows: Tensor) -> Tensor:
    """int64 [G]: what each segment of the budget has too few of ``rows`` bool [S] for."""
    return (plan.cu_k - slots(rows)[plan.segments]).diff().clamp(min=0)


def _at_most(layout: Layout, plan: Plan, share: tuple[int, int]) -> tuple[int, int]:
    """(tokens selected of a frame, sites of a frame), at most: what the host knows of it."""
    widest = layout.sites
    if layout.grid_of_each is not None:
        t, h, w = layout.grid_of_each
        widest = h * w
    elif not torch.compiler.is_compiling():
        widest = max((h * w for _, h, w in layout.grids), default=0)
    quota = torch.sym_min(plan.longest, widest)
    if plan.on_host is not None:
        quota = max([min(kept, -(-kept * widest // max(rows, 1))) for rows, kept in plan.on_host], default=0)
    elif layout.grid_of_each is not None:
        quota = torch.sym_min(quota, -(-plan.longest // torch.sym_max(t, 1)))
    return -(-quota * share[0] // share[1]), widest
