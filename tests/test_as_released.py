"""Values as the releases make them, each beside its rule written out token by token."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from test_linked_tokens import joined, scissor_parts, scissor_rule
from test_window_methods import GRIDS, check, clip

import vtok
from vtok import Layout, Packed, Stream, compress

from plain import clip as plain_clip
from plain import cosine, one_graph, videos


def dense(x, count, neighbours=4):
    """The centres of DPC-KNN among the rows of ``x``."""
    far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    rho = (-far.sort(1).values[:, :neighbours].square().mean(1)).exp()
    delta = torch.where(rho > rho[:, None], far, far.max()).amin(1)
    return (rho * delta).topk(count).indices.sort().values


def as_fastvid_releases(x, attention, size, m, scenes, share, every, blend):
    """(the rows of one video [T, n, D] of m tokens a frame, as FastVID's release makes them, its salient tokens)."""
    n, flat, rows, start = x.shape[1], x.flatten(0, 1), {}, 0
    some = int(m * share)
    salient = [n * f + i for f, row in enumerate(attention) for i in row.topk(m - some).indices.tolist()]
    rows |= {r: flat[r] for r in salient}
    for length in scenes:
        anchors = range(start + length - 1, start - 1, -every)
        rest = torch.tensor([r for r in range(n * start, n * (start + length)) if r not in salient])
        for anchor in anchors:
            own = rest[rest // n == anchor]
            centres = own[dense(flat[own], some * length // len(anchors))]
            unit = torch.nn.functional.normalize(flat, dim=-1)
            into = (unit[rest] @ unit[centres].T).argmax(1)
            for j, c in enumerate(centres.tolist()):
                mine, whole = rest[into == j], float(size[rest[into == j]].sum())
                w = max(1 / (whole + 1), blend)
                rows[c] = w * flat[c] + (1 - w) * (size[mine, None] * flat[mine]).sum(0) / whole
        start += length
    return rows, salient


# A video of three scenes, one without rows, and one of one scene.
CLIPS = [((10, 4, 6), [6, 1, 3]), ((0, 2, 2), []), ((7, 1, 25), [7])]


def planted(extra):
    """Videos of CLIPS in float64, each scene far from the others."""
    rows = []
    for (t, h, w), scenes in CLIPS:
        base = torch.eye(24).double()[[s for s, length in enumerate(scenes) for _ in range(length)]]
        rows += [(3 * base[:, None] + torch.randn(t, h * w, 24).double() / 2).flatten(0, 1)]
        rows += [torch.randn(extra, 24).double()]
    return torch.cat(rows)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("every, blend, weighted", [(2, 0.6, False), (4, 0.05, False), (3, 0.0, True), (9, 0.6, True)])
def test_fastvid_as_released(every, blend, weighted, extra):
    tokens, m, share = planted(extra).requires_grad_(), 5, Fraction(3, 5)
    attention, sizes = torch.rand(len(tokens)), torch.rand(len(tokens)) + 0.5 if weighted else None
    settings = {
        "extra_rows": extra, "budget": [t * m for (t, _, _), _ in CLIPS], "method": "fastvid", "attention": attention,
        "segments": 1, "similarity": 0.5, "contextual": float(share), "every": every, "blend": blend, "weights": sizes,
    }  # fmt: skip
    grids = [grid for grid, _ in CLIPS]
    packed, sane = (compress(tokens, grids, compat=compat, **settings) for compat in ("fastvid", None))
    assert packed.cu_seqlens.diff().tolist() == [k + extra for k in settings["budget"]] and packed.as_released
    assert torch.equal(packed.index, sane.index) == (every not in (2, 4)) and not sane.as_released
    assert torch.allclose(packed.values, sane.values, atol=1e-5) == (every == 9)
    want, fill, plain = tokens[packed.index], 0, tokens.detach()
    size = torch.ones(len(tokens)) if sizes is None else sizes
    for v, (start, ((t, h, w), scenes)) in enumerate(zip(packed.layout.cu_seqlens.tolist(), CLIPS, strict=False)):
        n, here = h * w, slice(start, start + t * h * w)
        rows, salient = as_fastvid_releases(
            tokens[here].view(t, n, 24), attention[here].view(t, n), size[here].double(), m, scenes, share, every, blend
        )
        slots = packed.cu_seqlens[v : v + 2].tolist()
        kept = (packed.index[slice(*slots)] - start).tolist()[: t * m]
        assert set(rows) <= set(kept)
        for slot, row in enumerate(kept):
            want = want.index_copy(0, torch.tensor([slots[0] + slot]), rows.get(row, tokens[start + row])[None])
        more = sorted((r for r in range(t * n) if r not in rows), key=lambda r: -float(attention[start + r]))
        assert set(kept) == set(rows) | set(more[: len(kept) - len(rows)])
        fill += len(kept) - len(rows)
        first = 0
        for length in scenes:  # of the most alike centre of the scene
            inside = [r for r in kept if first * n <= r < (first + length) * n and r in rows and r not in salient]
            unit = torch.nn.functional.normalize(plain[here], dim=-1)
            for r in range(first * n, (first + length) * n):
                best = r if r in kept else max(inside, key=lambda c: float(unit[r] @ unit[c]))
                assert packed.assignment[start + r] == slots[0] + kept.index(best)
            first += length
    assert fill == {2: 2, 4: 1, 3: 0, 9: 0}[every]
    assert torch.allclose(packed.values, want, atol=1e-6)
    up = torch.randn_like(want)
    got, expected = (torch.autograd.grad(y, tokens, up)[0] for y in (packed.values, want))
    assert torch.allclose(got, expected, atol=1e-6)
    weight = torch.zeros(len(packed.index)).index_add(0, packed.assignment, size)
    assert torch.allclose(packed.weight, weight) and len(weight) == packed.cu_seqlens[-1]


NESTED = [[(3 * f + v) % (h * w + 1) for f in range(t)] for v, (t, h, w) in enumerate(GRIDS)]
AMOUNTS = [
    *({"budget": b} for b in ("80%", 1, "100%", [42, 0, 3, 17, 0, 31, 1], NESTED)),
    {"total_budget": "30%"}, {"budget": [20, 0, 3, 12, 0, 30, 2], "min_per_frame": 2},
]  # fmt: skip


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_fastvid_as_released_meets_every_budget(amount, extra):
    settings = {"method": "fastvid", "compat": "fastvid", "every": 2, "contextual": 0.6, "segments": 2}
    tokens, layout = clip(extra=extra), Layout.from_grid(GRIDS, extra_rows=extra)
    rows = vtok.plan(GRIDS, **{name: amount[name] for name in amount if name != "min_per_frame"})
    packed = compress(tokens, layout, **amount, **settings)
    check(packed, rows, tokens, extra)
    low = compress(tokens.bfloat16(), layout, **amount, **settings)
    check(low, rows, tokens, extra)
    assert low.values.dtype == torch.bfloat16
    for v, alone in enumerate(packed.split()):  # a video does not depend on the others
        part = tokens[layout.cu_seqlens[v] : layout.cu_seqlens[v + 1]]
        own = [NESTED[v]] if amount.get("budget") is NESTED else [rows[v]]
        again = compress(
            part, [GRIDS[v]], extra_rows=extra, budget=own, min_per_frame=amount.get("min_per_frame", 0), **settings
        )
        assert torch.equal(again.assignment, alone.assignment) and alone.as_released
        assert torch.equal(again.values.nan_to_num(1), alone.values.nan_to_num(1))


def test_fastvid_as_released_frame_by_frame():
    """Under a nested budget every frame is a scene: its tokens that are not salient merge into its own centres."""
    x = torch.randn(3, 12, 8) + torch.randn(8) * 3
    attention = torch.rand(3, 12)
    packed = compress(
        x[None], budget=[[5, 5, 5]], method="fastvid", attention=attention.flatten(), contextual=0.6, compat="fastvid",
        segments=1, similarity=-1.0,
    )  # fmt: skip
    rows, _ = as_fastvid_releases(x, attention, torch.ones(36), 5, [1, 1, 1], Fraction(3, 5), 4, 0.6)
    assert packed.index.tolist() == sorted(rows)
    assert torch.allclose(packed.values, torch.stack([rows[r] for r in sorted(rows)]), atol=1e-5)


def test_fastvid_as_released_in_rounds_and_graphs(tmp_path):
    settings = {"method": "fastvid", "compat": "fastvid", "every": 2, "segments": 2}
    one_graph(budget=7, **settings), one_graph(budget="30%", **settings)
    tokens = torch.randn(2, 6, 10, 8)
    one = compress(tokens, budget=30, **settings)
    layout = Layout.from_grid([(1, 1, 30)] * 2)
    for method in ("tome", "evs", "fastvid"):  # a later round takes the values as they are
        later = compress(one.values, layout, budget=8, method=method, weights=one.weight)
        both = one.then(later)
        assert torch.equal(both.values, later.values) and both.as_released and both.shares is None
        assert torch.equal(both.weight, later.weight)
        assert torch.equal(both.unmerge(), one.unmerge(later.unmerge()))
    earlier = compress(tokens, budget=30, method="tome")
    last = compress(earlier.values, layout, budget=8, weights=earlier.weight, **settings)
    assert earlier.then(last).as_released and torch.equal(earlier.then(last).weight, last.weight)
    with pytest.raises(ValueError, match=r"expected a later round with weights=packed.weight"):
        one.then(compress(one.values, layout, budget=8, method="tome"))
    one.save(tmp_path / "a.safetensors")
    again = Packed.load(tmp_path / "a.safetensors")
    assert again.as_released and torch.equal(again.values, one.values) and one.trim().as_released
    leaves, tree = torch.utils._pytree.tree_flatten(one)
    assert torch.utils._pytree.tree_unflatten(leaves, tree).as_released
    stream = Stream(window=4, budget=7, **settings)
    first, last = stream.push(tokens), stream.flush()
    assert torch.equal(first.values, compress(tokens[:, :4], budget=7, **settings).values)
    assert torch.equal(last.values, compress(tokens[:, 4:], budget=7, **settings).values)
    for shape in [(2, 3, 4, 8), (1, 1, 1, 1), (0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)]:
        kept = compress(torch.randn(shape), budget=5, **settings)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            fake = compress(torch.randn(shape), budget=5, **settings)
            assert (fake.values.shape, fake.assignment.shape) == (kept.values.shape, kept.assignment.shape)


def as_scissor_releases(x, h, w, size, kept, above, capped):
    """(the rows ``kept`` of one video [T, n, D] as LLaVA-Scissor's release makes them, the slot of each token)."""
    flat, plain = x.flatten(0, 1), x.detach()
    (into, opens, *_), (part, _) = scissor_rule(plain, h, w, above, size), scissor_parts(plain, above, size)
    into = [r if capped and r in opens else to for r, to in enumerate(into)]
    ends, rows = joined(set(kept), into), range(len(flat))
    piece = [r if r in kept else part[r] for r in rows]  # a part, or a token that stands by itself
    survivors = []
    for k in kept:
        means = []
        for p in sorted({piece[r] for r in rows if ends[r] == k}):
            mine = [r for r in rows if piece[r] == p]
            means.append((size[mine, None] * flat[mine]).sum(0) / size[mine].sum())
        survivors.append(torch.stack(means).mean(0))
    went = []
    for r in rows:
        alike = [float(cosine(flat[r].detach(), s.detach())) for s in survivors]
        finite = [a for a in alike if a == a]
        went.append(alike.index(max(finite)) if finite else kept.index(ends[r]) if ends[r] >= 0 else -1)
    values = []
    for k, survivor in enumerate(survivors):
        mine = [r for r in rows if went[r] == k]
        values.append((survivor + (size[mine, None] * flat[mine]).sum(0)) / (size[mine].sum() + 1))
    return values, went


SCISSOR = [
    {"threshold": 0.6}, {"threshold": 0.6, "min_per_frame": 3}, {"threshold": 0.6, "capacity": 30}, {"budget": "80%"},
    {"budget": "30%"}, {"budget": 2}, {"budget": [40, 2, 9, 0, 3, 20]}, {"total_budget": 50},
]  # fmt: skip
CLIP = [(4, 3, 5), (0, 2, 2), (1, 3, 3), (3, 1, 5), (2, 2, 2), (2, 7, 2)]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("amount", SCISSOR, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_scissor_as_released(amount, extra, weighted):
    torch.manual_seed(extra)
    tokens = plain_clip(CLIP, extra).requires_grad_()
    sizes = torch.rand(len(tokens)) + 0.5 if weighted else None
    settings = {"method": "scissor", "extra_rows": extra, "weights": sizes} | amount
    settings |= {} if "threshold" in amount else {"similarity": 0.6}
    packed, sane = (compress(tokens, CLIP, compat=compat, **settings).trim() for compat in ("scissor", None))
    assert torch.equal(packed.index, sane.index) and torch.equal(packed.cu_seqlens, sane.cu_seqlens)
    assert packed.as_released and not torch.allclose(packed.values, sane.values, equal_nan=True)
    size, want, ends = torch.ones(len(tokens)) if sizes is None else sizes, [], []
    for (start, (_, h, w), x), v in zip(videos(tokens, CLIP, extra), range(len(CLIP)), strict=True):
        n = x.shape[0] * h * w
        kept = [r - start for r in packed.index[slice(*packed.cu_seqlens[v : v + 2].tolist())].tolist()]
        inside = [r for r in kept if r < n]
        values, went = as_scissor_releases(x, h, w, size[start : start + n], inside, 0.6, "capacity" in amount)
        want += [*values, *(tokens[start + r] for r in kept if r >= n)]
        into = [kept.index(r) if r in kept else went[r] if r < n else -1 for r in range(n + extra)]
        ends += [int(packed.cu_seqlens[v]) + k if k >= 0 else -1 for k in into]
    want = torch.stack(want)
    assert torch.allclose(packed.values, want, atol=1e-5, equal_nan=True)
    assert packed.assignment.tolist() == ends
    weight = torch.zeros(len(want)).index_add(0, packed.assignment.clamp(min=0), size * (packed.assignment >= 0))
    assert torch.allclose(packed.weight, weight) and (packed.weight > 0).all()
    if not want.isnan().any():
        up = torch.randn_like(want)
        got, expected = (torch.autograd.grad(y, tokens, up)[0] for y in (packed.values, want))
        assert torch.allclose(got, expected, atol=1e-5)


def test_scissor_as_released_in_rounds_and_graphs(tmp_path):
    settings = {"method": "scissor", "compat": "scissor"}
    one_graph(budget=7, **settings), one_graph(budget="30%", **settings), one_graph(threshold=0.3, **settings)
    tokens = torch.randn(2, 6, 10, 8).bfloat16()
    one = compress(tokens, budget=30, similarity=0.5, **settings)
    assert one.values.dtype == torch.bfloat16 and one.weight.tolist() != [1.0] * 60
    layout = Layout.from_grid([(1, 1, 30)] * 2)
    two = compress(one.values, layout, budget=8, weights=one.weight, similarity=0.5, **settings)
    both = one.then(two)
    assert torch.equal(both.values, two.values) and torch.equal(both.weight, two.weight) and both.weight.sum() == 120
    one.save(tmp_path / "a.safetensors")
    assert Packed.load(tmp_path / "a.safetensors").as_released
    for v, alone in enumerate(one.split()):
        again = compress(tokens[v : v + 1], budget=30, similarity=0.5, **settings)
        assert torch.equal(again.values, alone.values) and torch.equal(again.assignment, alone.assignment)
    stream = Stream(window=3, budget=7, **settings)
    first = stream.push(tokens)
    assert torch.equal(first.values[:7], compress(tokens[:1, :3], budget=7, **settings).values)
    for amount in ({"budget": 5}, {"threshold": 0.5}):
        for shape in [(2, 3, 4, 8), (1, 1, 1, 1), (0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)]:
            kept = compress(torch.randn(shape), **amount, **settings)
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
                fake = compress(torch.randn(shape), **amount, **settings)
                assert (fake.values.shape, fake.assignment.shape) == (kept.values.shape, kept.assignment.shape)


def as_flashvid_releases(x, size, counts, temporal):
    """The rows of one video [T, n, D] of one scene, none selected, as FlashVID releases them; some of a frame."""
    t, n, _ = x.shape
    flat = x.flatten(0, 1)
    unit = torch.nn.functional.normalize(flat, dim=-1).detach()
    link = [-1] * n
    for r in range(n, t * n):
        alike = unit[r] @ unit[(r // n - 1) * n : r // n * n].T
        link.append(int(alike.argmax()) + (r // n - 1) * n if alike.max() > temporal else -1)
    whole, count = {r: size[r] * flat[r] for r in range(t * n)}, size.tolist()
    for r in range(t * n - 1, -1, -1):  # a token adds all that it carries, and counts as one
        if link[r] >= 0:
            whole[link[r]], count[link[r]] = whole[link[r]] + whole[r], count[link[r]] + float(size[r])
    rows = {}
    for f, some in enumerate(counts):
        heads = [r for r in range(f * n, (f + 1) * n) if link[r] < 0]
        if some:
            means = torch.stack([whole[r] / count[r] for r in heads])
            centres = dense(means.detach(), some, 7)
            into = torch.cdist(means.detach(), means[centres].detach()).argmin(1)
            rows |= {heads[c]: means[into == j].mean(0) for j, c in enumerate(centres.tolist())}
    return rows


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_flashvid_as_released(weighted, extra):
    grids, budget = [(6, 3, 5), (0, 2, 2), (4, 2, 4)], [17, 0, 12]
    tokens = []
    for t, h, w in grids:
        scene = torch.randn(max(t, 1), h * w, 16).double() / 2
        scene = scene[:1] + scene * (torch.rand(len(scene), h * w, 1) < 0.8)
        tokens += [scene[:t].flatten(0, 1), torch.randn(extra, 16).double()]
    tokens = torch.cat(tokens).requires_grad_()
    sizes = torch.rand(len(tokens)) + 0.5 if weighted else None
    settings = {"extra_rows": extra, "budget": budget, "method": "flashvid", "segments": 1, "similarity": -1.0}
    settings |= {"selected": 0.0, "temporal": 0.6, "weights": sizes}
    packed, sane = (compress(tokens, grids, compat=compat, **settings) for compat in ("flashvid", None))
    assert packed.as_released and packed.cu_seqlens.diff().tolist() == [k + extra for k in budget]
    assert not torch.allclose(packed.values.sum(0), sane.values.sum(0), atol=1e-3)
    want, size, counts = [], torch.ones(len(tokens)) if sizes is None else sizes, packed.frame_counts.tolist()
    for v, (start, (t, _, _), x) in enumerate(videos(tokens, grids, extra)):
        part, frames = slice(start, start + x.shape[0] * x.shape[1]), int(packed.layout.cu_frames[v])
        rows = as_flashvid_releases(x, size[part].double(), counts[frames : frames + t], 0.6)
        kept = packed.index[slice(*packed.cu_seqlens[v : v + 2].tolist())].tolist()
        assert kept == [start + r for r in sorted(rows)] + [part.stop + e for e in range(extra)]
        want += [rows[r] for r in sorted(rows)] + list(tokens[part.stop : part.stop + extra])
    want, up = torch.stack(want), torch.randn(len(want), 16).double()
    assert torch.allclose(packed.values, want, atol=1e-6)
    got, expected = (torch.autograd.grad(y, tokens, up)[0] for y in (packed.values, want))
    assert torch.allclose(got, expected, atol=1e-6)


def test_flashvid_chains_as_released():
    settings = {"method": "flashvid", "compat": "flashvid", "segments": 1, "selected": 0.0}
    x = torch.tensor([1.0, 2, 4])[:, None] * torch.ones(3, 2)
    assert compress(x[None, :, None], budget=1, **settings).values.tolist() == [[3.5, 3.5]]
    assert compress(x[None, :2, None], budget=1, **settings).values.tolist() == [[1.5, 1.5]]
    pairs = torch.stack([torch.eye(3), 2 * torch.eye(3)])[None]
    floor = compress(pairs, budget=3, min_per_frame=1, **settings)  # a token is kept out of the middle of its chain
    late = floor.index[2]
    assert floor.frame_counts.tolist() == [2, 1] and torch.equal(floor.values[2], pairs.flatten(0, 2)[late])
    one_graph(budget=7, **settings), one_graph(budget="30%", **settings)
    for amount in AMOUNTS:
        tokens, rows = clip(extra=1), {name: amount[name] for name in amount if name != "min_per_frame"}
        packed = compress(tokens, GRIDS, extra_rows=1, **amount, **settings | {"selected": 0.3})
        check(packed, vtok.plan(GRIDS, **rows), tokens, 1)
        if amount == {"budget": "100%"}:
            assert torch.equal(packed.values.nan_to_num(7), tokens.nan_to_num(7))
    tokens = torch.randn(1, 6, 10, 8)
    one = compress(tokens, budget=30, **settings)
    two = compress(one.values, [(1, 1, 30)], budget=8, weights=one.weight, **settings)
    assert torch.equal(one.then(two).values, two.values) and one.then(two).as_released
