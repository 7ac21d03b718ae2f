"""fastvid, prunevid and holitom: exact budgets whatever the data, and their rules."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings, strategies

import vtok
from vtok import Compressor, Layout, Packed, Stream, compress, ops
from vtok.centres import nearest
from vtok.units import at, part_of, pulled, slots

from plain import one_graph

METHODS = ["fastvid", "holitom", "prunevid"]
GRIDS = [(7, 2, 3), (0, 2, 2), (1, 3, 2), (6, 1, 5), (3, 0, 2), (4, 4, 4), (2, 1, 1)]
every_method = pytest.mark.parametrize("method", METHODS)


def clip(grids=GRIDS, extra=0, channels=12, still=0.5):
    """Scenes of tokens many of which stay as they are, one NaN and one zero row among them."""
    rows = []
    for t, h, w in grids:
        x = torch.randn(t, h * w, channels)
        for f in range(1, t):
            if f % 5:
                same = torch.rand(h * w, 1) < still
                x[f] = torch.where(same, x[f - 1] + torch.randn(h * w, channels) / 50, x[f])
        if t > 2 and h * w:
            x[1, 0], x[2, -1, 0] = 0, math.nan
        rows += [x.flatten(0, 1), torch.randn(extra, channels)]
    return torch.cat(rows)


def expected_values(packed, tokens, core_share):
    """The rows of a merge in float64, from its assignment; ``core_share(all, core)`` is what the core has."""
    values = torch.zeros(len(packed.index), tokens.shape[1], dtype=torch.float64)
    size = torch.ones(len(tokens)) if packed.sizes is None else packed.sizes
    for slot, row in enumerate(packed.index.tolist()):
        members = (packed.assignment == slot).nonzero()[:, 0]
        weight = size[members].double()
        own = (members == row).double() * weight
        share = core_share(float(weight.sum()), float(own.sum()))
        rest = weight - own
        mean = own / own.sum() * share + (rest / rest.sum() * (1 - share) if rest.sum() else 0)
        values[slot] = (tokens[members].double() * mean[:, None]).sum(0)
    return values


def check(packed, rows, tokens, extra):
    layout = packed.layout
    kept = [k + extra for k in rows]
    assert packed.cu_seqlens.diff().tolist() == kept and (packed.index >= 0).all()
    assert (packed.index.diff() > 0).all()
    assert torch.equal(layout.video_of(packed.index), torch.arange(layout.videos).repeat_interleave(torch.tensor(kept)))
    own = packed.assignment[packed.index]
    assert torch.equal(own, torch.arange(len(own)))  # the row that it stands at is in it
    joined = packed.assignment >= 0
    into = packed.index[packed.assignment[joined]]
    assert torch.equal(layout.video_of(into), layout.video_of(joined.nonzero()[:, 0]))
    assert torch.equal(packed.weight, torch.bincount(packed.assignment[joined], minlength=len(own)).float())
    assert packed.mask[layout.extra_mask()].all()
    if packed.as_released:
        with pytest.raises(ValueError, match="expected means by assignment to repeat on x, got values as"):
            packed.reduce(tokens)
    else:
        assert torch.equal(packed.reduce(tokens).nan_to_num(9), packed.values.nan_to_num(9))
    nan = packed.values.isnan().any(-1)
    assert (packed.weight[nan] == 1).all()  # NaN joins nothing
    if packed.shares is not None:
        assert packed.shares.isfinite().all() and (packed.shares >= 1).all()


def options_of(method, tokens, given):
    if not given or method == "prunevid":
        return {}
    return {"attention": torch.rand(len(tokens))} | ({"contextual": 0.3} if method == "holitom" else {})


@every_method
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("budget", ["80%", 0.1, 1, "100%", [42, 0, 3, 17, 0, 31, 1], 9, Fraction(3, 7)], ids=str)
def test_the_budget_is_met_exactly(method, budget, extra):
    tokens = clip(extra=extra)
    rows = vtok.plan(GRIDS, budget=budget)
    for given_too in (False, True):
        options = options_of(method, tokens, given_too)
        packed = compress(tokens, GRIDS, extra_rows=extra, budget=budget, method=method, **options)
        check(packed, rows, tokens, extra)
        if budget == "100%":
            assert torch.equal(packed.values.nan_to_num(7), tokens.nan_to_num(7))


@every_method
def test_other_budgets(method):
    tokens = clip(extra=1)
    total = compress(tokens, GRIDS, extra_rows=1, total_budget="30%", method=method)
    check(total, vtok.plan(GRIDS, total_budget="30%"), tokens, 1)
    nested = [[(3 * f + v) % (h * w + 1) for f in range(t)] for v, (t, h, w) in enumerate(GRIDS)]
    packed = compress(tokens, GRIDS, extra_rows=1, budget=nested, method=method)
    check(packed, [sum(row) for row in nested], tokens, 1)
    assert packed.frame_counts.tolist() == [k for row in nested for k in row]
    rows = [20, 0, 3, 12, 0, 30, 2]
    floor = compress(tokens, GRIDS, extra_rows=1, budget=rows, min_per_frame=2, method=method)
    check(floor, rows, tokens, 1)
    sites = [h * w for t, h, w in GRIDS for _ in range(t)]
    assert all(k >= min(2, n) for k, n in zip(floor.frame_counts.tolist(), sites, strict=True))
    with pytest.raises(ValueError, match=f"method '{method}': expected a budget, got a threshold"):
        compress(tokens, GRIDS, extra_rows=1, threshold=0.5, method=method)


@settings(deadline=None, max_examples=25)
@given(
    strategies.sampled_from(METHODS),
    strategies.lists(strategies.tuples(*[strategies.integers(0, 5)] * 3), min_size=1, max_size=3),
    strategies.integers(1, 100),
    strategies.sampled_from([0.0, 0.5, 0.95, 1.0]),
    strategies.integers(0, 2),
    strategies.integers(0, 10**6),
)
@example("prunevid", [(0, 1, 1), (4, 0, 0)], 1, 0.0, 1, 0)  # rows after the grids, of more frames than rows
def test_the_budget_is_met_exactly_everywhere(method, grids, percent, still, extra, seed):
    torch.manual_seed(seed)
    tokens = clip(grids, extra, 6, still)
    packed = compress(tokens, grids, extra_rows=extra, budget=f"{percent}%", method=method)
    check(packed, vtok.plan(grids, budget=f"{percent}%"), tokens, extra)


@every_method
def test_rows_after_the_grids_decide_nothing(method):
    grids = [(3, 1, 4), (4, 1, 4)]
    tokens = torch.cat([torch.randn(4, 8).repeat(t, 1) for t, _, _ in grids]) + 0.05 * torch.randn(28, 8)
    one, other = (
        compress(torch.cat([tokens[:12], x, tokens[12:], x]), grids, extra_rows=4, budget="40%", method=method)
        for x in (tokens[:4], -tokens[:4])
    )
    assert torch.equal(one.assignment, other.assignment)


@every_method
@pytest.mark.parametrize("budget", ["20%", "60%"])
def test_a_video_does_not_depend_on_the_others(method, budget):
    tokens, layout = clip(extra=1), Layout.from_grid(GRIDS, extra_rows=1)
    attention = torch.rand(len(tokens))
    options = {} if method == "prunevid" else {"attention": attention}
    whole = compress(tokens, layout, budget=budget, method=method, **options)
    for v, alone in enumerate(whole.split()):
        part = slice(int(layout.cu_seqlens[v]), int(layout.cu_seqlens[v + 1]))
        if options:
            options = {"attention": attention[part]}
        k = len(alone.index) - 1
        again = compress(tokens[part], [GRIDS[v]], extra_rows=1, budget=[k], method=method, **options)
        assert torch.equal(again.index, alone.index) and torch.equal(again.assignment, alone.assignment)
        assert torch.equal(again.values.nan_to_num(1), alone.values.nan_to_num(1))
        assert torch.equal(again.scores.nan_to_num(9), alone.scores.nan_to_num(9))
    if method != "prunevid":
        options = {"attention": attention}
    again = compress(tokens, layout, budget=budget, method=method, **options)
    assert torch.equal(again.values.nan_to_num(1), whole.values.nan_to_num(1))


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(method, dtype):
    tokens = clip(extra=1).to(dtype)
    packed = compress(tokens, GRIDS, extra_rows=1, budget="30%", method=method, weights=torch.ones(len(tokens)))
    check(packed, vtok.plan(GRIDS, budget="30%"), tokens, 1)
    assert packed.values.dtype == dtype and packed.weight.dtype == torch.float32


# Rules


def test_fastvid_values_are_centres_and_means():
    tokens = torch.randn(2, 8, 12, 16)
    packed = compress(tokens, budget=30, method="fastvid")
    assert packed.weight.max() > 2 and (packed.assignment >= 0).all()
    want = expected_values(packed, tokens.flatten(0, 2), lambda whole, core: 0.6 + 0.4 * core / whole)
    assert torch.allclose(packed.values.double(), want, atol=1e-6)
    plain = compress(tokens, budget=30, method="fastvid", blend=0.0)
    want = expected_values(plain, tokens.flatten(0, 2), lambda whole, core: core / whole)
    assert torch.equal(plain.index, packed.index) and torch.allclose(plain.values.double(), want, atol=1e-6)


def fastvid_rows(t, n, k, scenes, share, every):
    """(salient tokens, centres) of each frame by the rule."""
    each = [k * (f + 1) // t - k * f // t for f in range(t)]
    centres = [int(m * share) for m in each]
    own, start = [0] * t, 0
    for length in scenes:
        anchors = list(range(start + length - 1, start - 1, -every))[::-1]
        whole = sum(centres[start : start + length])
        for j, f in enumerate(anchors):
            own[f] = whole * (j + 1) // len(anchors) - whole * j // len(anchors)
        start += length
    return [m - c for m, c in zip(each, centres, strict=True)], own


@pytest.mark.parametrize("k, share, every", [(37, Fraction(2, 5), 4), (60, Fraction(1, 2), 2), (11, Fraction(1), 3)])
def test_fastvid_shares_of_frames(k, share, every):
    base = torch.randn(3, 10, 8) * 3
    x = base[[0] * 6 + [1] * 2 + [2] * 5] + torch.randn(13, 10, 8) / 4
    attention = torch.rand(13, 10)
    packed = compress(
        x[None], budget=k, method="fastvid", attention=attention.flatten(), segments=3, contextual=float(share),
        similarity=0.5, every=every,
    )  # fmt: skip
    salient, centres = fastvid_rows(13, 10, k, [6, 2, 5], share, every)
    assert packed.frame_counts.tolist() == [a + b for a, b in zip(salient, centres, strict=True)]
    for f, some in enumerate(salient):
        best = attention[f].topk(some).indices + 10 * f
        assert packed.mask[best].all() and (packed.weight[packed.assignment[best]] == 1).all()
    group = torch.tensor([0] * 60 + [1] * 20 + [2] * 50)
    stays = torch.zeros(130, dtype=torch.bool)
    stays[torch.cat([attention[f].topk(some).indices + 10 * f for f, some in enumerate(salient)])] = True
    middle = [i for i in packed.index.tolist() if not stays[i]]
    flat = torch.nn.functional.normalize(x.flatten(0, 1).double(), dim=-1)
    for row in range(130):
        near = [i for i in middle if group[i] == group[row]]
        if stays[row]:
            continue
        best = max(near, key=lambda i: float(flat[row] @ flat[i]), default=None)
        assert packed.assignment[row] == (-1 if best is None else packed.index.tolist().index(best))


def test_fastvid_fills_up_where_an_anchor_has_too_few_tokens():
    packed = compress(torch.randn(1, 8, 6, 5), budget=44, method="fastvid", segments=1, similarity=-1.0, contextual=0.9)
    assert packed.values.shape == (44, 5) and (packed.assignment >= 0).all()


@pytest.mark.parametrize("each", [1, 2, 5])
def test_nearest(each):
    tokens = torch.randn(60, 7)
    groups, centre = torch.tensor([0, 30, 30, 41, 60]), torch.zeros(60, dtype=torch.bool)
    centre[[3, 9, 10, 29, 50, 59]] = True
    tokens[10], tokens[12], tokens[7] = 2 * tokens[9], -tokens[9], math.nan
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    listed, count = ops.compact(centre, groups, 6)
    got = at(listed, nearest(tokens, tokens[listed], slots(count), groups, each)).tolist()
    for row in range(60):
        near = [3, 9, 29] if row < 30 else [50, 59] if row >= 41 else []  # 10 is as near as 9 and comes later
        best = max(near, key=lambda i: float(unit[row] @ unit[i]), default=-1)
        assert got[row] == (-1 if row == 7 else best)


def test_prunevid_of_a_static_clip_and_a_cut():
    scenes = torch.randn(2, 20, 16) * 2
    x = scenes[[0] * 5 + [1] * 3][None]
    packed = compress(x, budget=20, method="prunevid")
    assert packed.positions[:, 0].unique().tolist() == [0, 5]  # each scene is its first frame
    assert packed.frame_counts.tolist() == [10, 0, 0, 0, 0, 10, 0, 0] and packed.weight.sum() == 160
    exact = compress(x, budget=40, method="prunevid")
    assert torch.allclose(exact.values, scenes.flatten(0, 1), atol=1e-6)
    assert exact.weight.tolist() == [5.0] * 20 + [3.0] * 20
    more = compress(x, budget=50, method="prunevid")
    assert more.values.shape[0] == 50 and more.weight.sum() == 160
    assert more.index[:20].tolist() == list(range(20))


def test_prunevid_windows_of_one_frame_are_dynamic():
    x = torch.randn(1, 9, 6).repeat(1, 1, 1)[None]
    packed = compress(x, budget=9, method="prunevid")
    assert torch.equal(packed.values, x[0, 0]) and packed.weight.tolist() == [1.0] * 9
    assert compress(x, budget=4, method="prunevid").weight.sum() == 9


def test_prunevid_static_sites_by_mean_pairwise_cosine():
    x = torch.randn(6, 30, 4)
    x[1:] = x[:1] + torch.randn(5, 30, 4) * torch.rand(30, 1)
    packed = compress(x[None], budget=100, method="prunevid", segment_ratio=0.1, similarity=0.7)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    mean = (torch.einsum("aic,bic->i", unit, unit) - 6) / 30
    units = int((mean > 0.7).sum()) + 6 * int((mean <= 0.7).sum())
    exact = compress(x[None], budget=units, method="prunevid", segment_ratio=0.1, similarity=0.7)
    assert ((exact.weight == 6).nonzero()[:, 0]).tolist() == (mean > 0.7).nonzero()[:, 0].tolist()
    assert set(exact.weight.tolist()) <= {1.0, 6.0} and packed.weight.sum() == 180


def test_holitom_blends_and_drops():
    x = torch.randn(1, 1, 30, 16)
    packed = compress(x, budget=9, method="holitom")
    assert packed.weight.tolist() == [1.0] * 9 and (packed.assignment == -1).sum() == 21
    packed = compress(x, budget=9, method="holitom", contextual=0.5)
    assert packed.weight.sum() == 30 - (packed.assignment == -1).sum() == 30
    want = expected_values(packed, x[0, 0], lambda whole, core: 0.6 if core < whole else 1)
    assert torch.allclose(packed.values.double(), want, atol=1e-6)
    assert (packed.weight == 1).sum() >= 4  # round(9 · 0.5) draw attention
    for blend, share in (
        (0.2, lambda whole, core: 0.2 if core < whole else 1),
        (0.0, lambda whole, core: core / whole),
    ):
        packed = compress(x, budget=15, method="holitom", contextual=1.0, blend=blend)
        assert (packed.weight == 2).any()  # where the centre's own part is half
        assert torch.allclose(packed.values.double(), expected_values(packed, x[0, 0], share), atol=1e-6)


def test_holitom_static_units_blend_as_temporal_means():
    scene = torch.randn(12, 16)
    x = scene + torch.randn(4, 12, 16) / 100
    packed = compress(x[None], budget=5, method="holitom")
    assert packed.frame_counts.tolist() == [5, 0, 0, 0] and packed.weight.sum() == 48
    site = packed.assignment.view(4, 12)
    assert (site == site[0]).all()
    mean = x.mean(0).double()
    for slot, centre in enumerate(packed.index.tolist()):
        others = [i for i in range(12) if site[0, i] == slot and i != centre]
        want = 0.6 * mean[centre] + 0.4 * mean[others].mean(0) if others else mean[centre]
        assert torch.allclose(packed.values[slot].double(), want, atol=1e-6)


def test_part_of_rounds_the_rest_half_to_even():
    k = torch.arange(50)
    for numerator, denominator in [(0, 1), (1, 1), (1, 2), (1, 4), (3, 4), (3, 10)]:
        rest = [round(Fraction(denominator - numerator, denominator) * i) for i in range(50)]
        assert part_of(k, (numerator, denominator)).tolist() == [i - r for i, r in enumerate(rest)]


@pytest.mark.parametrize("add", [False, True])
def test_pulled(add):
    assignment, core = torch.tensor([0, 0, 0, -1, 1, 2, 2, 3]), torch.tensor([1, 0, 0, 1, 1, 1, 0, 0]).bool()
    sizes = torch.tensor([2.0, 3, 5, 1, 4, 9, 1, 2])
    shares = pulled(assignment, core, 4, 0.6, sizes, add=add)
    for g, (own, whole) in enumerate([(2, 10), (4, 4), (9, 10), (0, 2)]):
        got = shares[(assignment == g) & core].sum() / shares[assignment == g].sum()
        want = (0.6 + 0.4 * own / whole if add else 0.6) if own else 0
        assert float(got) == pytest.approx(want if own < whole else 1)


# Rounds, files, gradients


@every_method
def test_weights_of_earlier_rounds_add_up(method):
    tokens = torch.randn(2, 6, 10, 8)
    options = {"contextual": 0.5} if method == "holitom" else {}
    one = compress(tokens, budget=30, method=method, **options)
    layout = Layout.from_grid([(1, 1, 30)] * 2)
    two = compress(one.values, layout, budget=8, method=method, weights=one.weight, **options)
    assert two.weight.sum() == one.weight[two.assignment >= 0].sum()
    both = one.then(two)
    assert torch.equal(both.weight, two.weight) and (both.shares is not None) == (method != "prunevid")
    assert torch.allclose(both.reduce(tokens.flatten(0, 2)), two.values, atol=1e-5)
    plain = one.then(compress(one.values, layout, budget=8, method="evs"))
    assert torch.allclose(plain.reduce(tokens.flatten(0, 2)), plain.values, atol=1e-5)


def test_what_was_pulled_is_kept_on_disk_and_in_parts(tmp_path):
    tokens = clip(GRIDS[3:], extra=1)
    packed = compress(tokens, GRIDS[3:], extra_rows=1, budget="30%", method="fastvid")
    packed.save(tmp_path / "a.safetensors")
    again = Packed.load(tmp_path / "a.safetensors")
    assert torch.equal(again.shares, packed.shares) and packed.shares.max() > 1
    assert torch.equal(again.reduce(tokens).nan_to_num(5), packed.values.nan_to_num(5))
    part = tokens.split((packed.layout.cu_seqlens.diff()).tolist())
    for alone, x in zip(packed.split(), part, strict=True):
        assert torch.equal(alone.reduce(x).nan_to_num(5), alone.values.nan_to_num(5))
    assert torch.equal(packed.trim().shares, packed.shares)
    leaves, tree = torch.utils._pytree.tree_flatten(packed)
    assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, tree).shares, packed.shares)


@every_method
def test_gradients_are_those_of_the_merge(method):
    tokens = torch.randn(1, 5, 8, 6, dtype=torch.float64, requires_grad=True)
    packed = compress(tokens, budget=12, method=method)
    packed.values.sum().backward()
    gone = (packed.assignment == -1).view(5, 8)
    assert (tokens.grad[0][gone] == 0).all() and tokens.grad.sum() == pytest.approx(12 * 6)


@every_method
def test_one_graph(method):
    one_graph(method=method, budget=7), one_graph(method=method, budget="30%")


@every_method
@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (1, 1, 1, 1), (0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)], ids=str)
def test_no_value_is_read_on_the_host_and_nothing_is_too_small(method, shape):
    kept = compress(torch.randn(shape), budget=5, method=method)
    assert kept.values.shape[0] == min(5, shape[1] * shape[2]) * shape[0]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = compress(torch.randn(shape), budget=5, method=method)
        assert (fake.values.shape, fake.assignment.shape) == (kept.values.shape, kept.assignment.shape)


@every_method
def test_windows_of_a_stream(method):
    tokens = torch.randn(2, 9, 6, 8)
    stream = Stream(method, window=4, budget=7)
    first, last = stream.push(tokens), stream.flush()
    assert torch.equal(first.values[7:14], compress(tokens[:1, 4:8], budget=7, method=method).values)
    assert last.values.shape == (12, 8)
    assert torch.equal(Compressor(method=method, budget=7)(tokens[:, :4]).values[:7], first.values[:7])


def test_errors():
    tokens = torch.randn(1, 4, 6, 8)
    for method, text, change in [
        ("fastvid", "attention of floats", {"attention": torch.rand(3)}),
        ("fastvid", "attention of floats", {"attention": torch.ones(24, dtype=torch.int64)}),
        ("fastvid", r"features of shape \[4, C\]", {"features": torch.rand(3, 8)}),
        ("fastvid", "segments >= 1", {"segments": 0}),
        ("fastvid", "every >= 1", {"every": 0}),
        ("fastvid", r"blend in \[0, 1\)", {"blend": 1.0}),
        ("fastvid", "compat None or 'fastvid', got 'release'", {"compat": "release"}),
        ("fastvid", r"contextual as a share in \[0, 1\]", {"contextual": 1.5}),
        ("holitom", "most >= 1", {"most": 0}),
        ("holitom", r"blend in \[0, 1\)", {"blend": -0.1}),
        ("holitom", "attention of floats", {"attention": torch.rand(24, 1)}),
        ("prunevid", "segment_ratio as a share", {"segment_ratio": -1}),
        ("prunevid", "cluster_ratio as a share", {"cluster_ratio": 2}),
    ]:
        with pytest.raises(ValueError, match=f"method '{method}': expected .*{text}"):
            compress(tokens, budget=6, method=method, **change)
