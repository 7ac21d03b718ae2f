"""flashvid: exact budgets whatever the data, its rules, and what the original returned (golden/tokens)."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies
from test_window_methods import GRIDS, check, clip, expected_values

import vtok
from vtok import Compressor, Layout, Stream, compress
from vtok.methods.flashvid import spread

from plain import one_graph

GOLDEN = Path(__file__).with_name("golden")
CASES = json.loads((GOLDEN / "tokens" / "flashvid.json").read_text())["cases"]


def flashvid(tokens, grids=None, **settings):
    return compress(tokens, grids, method="flashvid", **settings)


# The selection


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_selection_is_the_release_s(case):
    golden = np.load(GOLDEN / case["file"], allow_pickle=False)
    x, attention, k = torch.from_numpy(golden["in_x"]), torch.from_numpy(golden["in_attn"]), case["params"]["K"]
    frames, n, _ = x.shape
    layout = Layout.from_grid([(frames, 1, n)])
    for name, weight in [("attn_div", attention), ("div", torch.ones(frames, n))]:
        got = spread(x.flatten(0, 1), weight.flatten(), layout, torch.full((frames,), k), k, n)
        want = torch.from_numpy(golden[f"out_index_{name}"]) + n * torch.arange(frames)[:, None]
        assert torch.equal(got.nonzero()[:, 0], want.flatten())


def spread_of(x, weight, k):
    """The tokens of one frame that the rule takes, in float64."""
    if not k:
        return []
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    far = ((1 - unit @ unit.T) * weight.double()).fill_diagonal_(0)
    taken, least = [], far.sort(0).values[min(1, len(x) - 1)].tolist()
    for step in range(k):
        taken.append(max((i for i in range(len(x)) if i not in taken), key=lambda i: (least[i], -i)))
        near = far[taken[-1]].tolist()
        least = [min(a, b) if step else b for a, b in zip(least, near, strict=True)]
    return sorted(taken)


def test_spread_of_ragged_frames():
    grids, extra = [(3, 2, 4), (0, 1, 1), (2, 1, 1), (1, 3, 5), (2, 0, 3)], 2
    layout = Layout.from_grid(grids, extra_rows=extra)
    x, weight = torch.randn(layout.total, 6), torch.randn(layout.total)
    k = torch.tensor([8, 0, 3, 1, 0, 7, 0, 0])
    for steps, widest in [(8, 15), (20, 24)]:
        got = spread(x, weight, layout, k, steps, widest)
        want = []
        for first, n, some in zip(*(part.tolist() for part in layout.frame_starts()), k.tolist(), strict=True):
            want += [first + i for i in spread_of(x[first : first + n], weight[first : first + n], some)]
        assert got.nonzero()[:, 0].tolist() == want


def test_spread_ties_to_the_lower_row_and_nan_last():
    layout, weight = Layout.from_grid([(1, 1, 6)]), torch.ones(6)
    x = torch.tensor([[1.0, 0], [0, 1], [math.nan, 0], [0, 3], [2, 0], [0, 0]])

    def taken(k):
        return spread(x, weight, layout, torch.tensor([k]), k, 6).nonzero()[:, 0].tolist()

    # The zero row is the only one without an equal; then all are as far, and each of a pair is near once one is taken.
    assert [taken(k) for k in range(7)] == [
        [], [5], [0, 5], [0, 1, 5], [0, 1, 3, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]
    ]  # fmt: skip
    few = torch.tensor([[1.0, 0], [0.3, 0.95], [0, 0]])  # 0.7 apart, and 1 from the zero row
    assert spread(few, weight, Layout.from_grid([(1, 1, 3)]), torch.tensor([1]), 1, 3).tolist() == [False, False, True]
    alone = x[2:4].repeat(3, 1)
    assert spread(alone, weight, Layout.from_grid([(3, 1, 2)]), torch.ones(3, dtype=torch.int64), 1, 2).tolist() == [
        False, True] * 3  # fmt: skip
    same = spread(torch.ones(6, 2), weight, layout, torch.tensor([3]), 3, 6)
    assert same.tolist() == [True] * 3 + [False] * 3


# The rules


def test_chains_are_means_of_all_their_tokens():
    x = torch.tensor([1.0, 2, 4])[:, None] * torch.ones(3, 2)
    packed = flashvid(x[None, :, None], budget=1, segments=1, selected=0.0)
    assert torch.allclose(packed.values, torch.full((1, 2), 7 / 3)) and packed.weight.tolist() == [3.0]
    assert packed.index.tolist() == [0]  # where the chain begins
    weighted = flashvid(x, [(3, 1, 1)], budget=1, segments=1, selected=0.0, weights=torch.tensor([1.0, 1, 2]))
    assert torch.allclose(weighted.values, torch.full((1, 2), 11 / 4)) and weighted.weight.tolist() == [4.0]


def test_the_least_alike_links_are_cut_first():
    angles = torch.tensor([0.0, 0.1, 0.35, 0.4])
    x = torch.stack([angles.cos(), angles.sin()], -1)[None, :, None]
    cut = {1: [0, 0, 0, 0], 2: [0, 0, 1, 1], 3: [0, 1, 2, 2], 4: [0, 1, 2, 3]}
    for budget, want in cut.items():
        packed = flashvid(x, budget=budget, segments=1, similarity=-1.0, selected=0.0)
        assert packed.assignment.tolist() == want
    assert flashvid(x, budget=3, segments=1, similarity=-1.0, selected=0.0, temporal=1.0).weight.sum() == 3


def test_links_go_anywhere_in_the_frame_before_but_not_over_a_cut():
    scene = torch.eye(12)[:5] * 3
    x = torch.stack([scene, scene.roll(2, 0), scene.roll(1, 0), torch.eye(12)[5:10], torch.eye(12)[5:10].flip(0)])
    packed = flashvid(x[None], budget=10, segments=1, similarity=0.5, selected=0.0)
    assert packed.index.tolist() == [*range(5), *range(15, 20)] and packed.weight.tolist() == [3.0] * 5 + [2.0] * 5
    assert torch.equal(packed.values, torch.cat([scene, torch.eye(12)[5:10]]))
    apart = flashvid(x[None], budget=10, segments=5, selected=0.0)
    assert (apart.frame_counts == 2).all() and (apart.weight.view(5, 2).sum(1) == 5).all()


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_nothing_links_within_a_frame(extra):
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 2]])
    tokens = torch.cat([x, torch.ones(extra, 3)])
    packed = flashvid(tokens, [(2, 1, 2)], extra_rows=extra, budget=3, segments=1, similarity=-1.0, selected=0.0)
    assert packed.frame_counts.tolist() == [1, 2]  # of four groups


def test_the_threshold_is_strict():
    x = torch.ones(1, 3, 1, 2)
    linked, apart = (flashvid(x, budget=2, segments=1, selected=0.0, temporal=value) for value in (0.99, 1.0))
    assert linked.index.tolist() == [0, 1] and linked.weight.sum() == 3  # the first link is cut
    assert apart.index.tolist() == [1, 2] and apart.weight.sum() == 2  # shares of three groups


@pytest.mark.parametrize("share", [Fraction(7, 10), Fraction(0), Fraction(1), Fraction(1, 3)])
def test_selected_tokens_stay_as_they_are(share):
    base = torch.randn(3, 10, 16) * 2
    x = base[[0] * 6 + [1] + [2] * 5] + torch.randn(12, 10, 16) / 3
    attention, k = torch.rand(12, 10), 43
    packed = flashvid(
        x[None], budget=k, attention=attention.flatten(), segments=3, similarity=0.5, selected=float(share)
    )
    each = [k * (f + 1) // 12 - k * f // 12 for f in range(12)]
    scene = [slice(0, 6)] * 6 + [slice(6, 7)] + [slice(7, 12)] * 5
    chosen = []
    for f, some in enumerate(each):
        relevance = x[f].double() @ x[scene[f]].double().flatten(0, 1).mean(0)
        chosen += [10 * f + i for i in spread_of(x[f], attention[f] * relevance, math.ceil(some * float(share)))]
    assert packed.mask[chosen].all() and (packed.weight[packed.assignment[chosen]] == 1).all()
    if share == 1:
        assert packed.index.tolist() == chosen and (packed.assignment == -1).sum() == 120 - k
    else:
        assert packed.weight.sum() == 120 - (packed.assignment == -1).sum() > 100 and packed.weight.max() > 1
    want = expected_values(packed, x.flatten(0, 1), lambda whole, core: core / whole)
    assert torch.allclose(packed.values.double(), want, atol=1e-6)


def test_a_scene_of_one_frame_uses_nothing_twice():
    packed = flashvid(torch.randn(1, 1, 30, 8), budget=9)
    assert packed.weight.sum() == 30 and (packed.index.diff() > 0).all()
    assert (packed.weight == 1).sum() >= 7  # ⌈9 · 0.7⌉


def test_a_static_clip():
    scene = torch.randn(20, 16)
    packed = flashvid(scene.expand(1, 6, 20, 16), budget=20, segments=1, selected=0.0)
    assert torch.allclose(packed.values, scene, atol=1e-6) and packed.weight.tolist() == [6.0] * 20
    assert packed.index.tolist() == list(range(20))
    half = flashvid(scene.expand(1, 6, 20, 16), budget=30, segments=1)
    assert half.values.shape == (30, 16) and half.weight.sum() == 120


# Budgets


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("budget", ["80%", 0.1, 1, "100%", [42, 0, 3, 17, 0, 31, 1], 9, Fraction(3, 7)], ids=str)
def test_the_budget_is_met_exactly(budget, extra):
    tokens = clip(extra=extra)
    for options in ({}, {"attention": torch.rand(len(tokens))}, {"selected": 0.0}):
        packed = flashvid(tokens, GRIDS, extra_rows=extra, budget=budget, **options)
        check(packed, vtok.plan(GRIDS, budget=budget), tokens, extra)
        if budget == "100%":
            assert torch.equal(packed.values.nan_to_num(7), tokens.nan_to_num(7))


def test_other_budgets():
    tokens = clip(extra=1)
    total = flashvid(tokens, GRIDS, extra_rows=1, total_budget="30%")
    check(total, vtok.plan(GRIDS, total_budget="30%"), tokens, 1)
    nested = [[(3 * f + v) % (h * w + 1) for f in range(t)] for v, (t, h, w) in enumerate(GRIDS)]
    packed = flashvid(tokens, GRIDS, extra_rows=1, budget=nested)
    check(packed, [sum(row) for row in nested], tokens, 1)
    assert packed.frame_counts.tolist() == [k for row in nested for k in row]
    rows = [20, 0, 3, 12, 0, 30, 2]
    floor = flashvid(tokens, GRIDS, extra_rows=1, budget=rows, min_per_frame=2)
    check(floor, rows, tokens, 1)
    sites = [h * w for t, h, w in GRIDS for _ in range(t)]
    assert all(k >= min(2, n) for k, n in zip(floor.frame_counts.tolist(), sites, strict=True))


@settings(deadline=None, max_examples=25)
@given(
    strategies.lists(strategies.tuples(*[strategies.integers(0, 5)] * 3), min_size=1, max_size=3),
    strategies.integers(1, 100),
    strategies.sampled_from([0.0, 0.5, 0.95, 1.0]),
    strategies.sampled_from([0.0, 0.3, 0.7, 1.0]),
    strategies.integers(0, 2),
    strategies.integers(0, 10**6),
)
@example([(0, 0, 0), (2, 1, 1)], 1, 0.0, 0.3, 1, 0)  # the first frame does not begin at the first row
def test_the_budget_is_met_exactly_everywhere(grids, percent, still, selected, extra, seed):
    torch.manual_seed(seed)
    tokens = clip(grids, extra, 6, still)
    packed = flashvid(tokens, grids, extra_rows=extra, budget=f"{percent}%", selected=selected, segments=2)
    check(packed, vtok.plan(grids, budget=f"{percent}%"), tokens, extra)


def test_nan_hurts_nobody_else():
    tokens = torch.randn(1, 5, 8, 6)
    tokens[0, 2, 3] = math.nan
    packed = flashvid(tokens, budget=20, segments=1, similarity=-1.0)
    check(packed, [20], tokens.flatten(0, 2), 0)
    assert packed.values.isfinite().all() and packed.assignment[19] == -1
    # Its scene's other tokens are chosen as if it was not there.
    chosen = torch.cat([part[part.isfinite().all(-1)] for part in tokens[0]])
    mean = chosen.double().mean(0)
    for f in (0, 1, 3, 4):
        some = spread_of(tokens[0, f], tokens[0, f].double() @ mean, 3)
        assert packed.mask.view(5, 8)[f, some].all()


# Batches, graphs, rounds


@pytest.mark.parametrize("budget", ["20%", "60%"])
def test_a_video_does_not_depend_on_the_others(budget):
    tokens, layout = clip(extra=1), Layout.from_grid(GRIDS, extra_rows=1)
    attention = torch.rand(len(tokens))
    whole = flashvid(tokens, layout, budget=budget, attention=attention)
    for v, alone in enumerate(whole.split()):
        part = slice(int(layout.cu_seqlens[v]), int(layout.cu_seqlens[v + 1]))
        k = len(alone.index) - 1
        again = flashvid(tokens[part], [GRIDS[v]], extra_rows=1, budget=[k], attention=attention[part])
        assert torch.equal(again.index, alone.index) and torch.equal(again.assignment, alone.assignment)
        assert torch.equal(again.values.nan_to_num(1), alone.values.nan_to_num(1))
        assert torch.equal(again.scores.nan_to_num(9), alone.scores.nan_to_num(9))
    again = flashvid(tokens, layout, budget=budget, attention=attention)
    assert torch.equal(again.values.nan_to_num(1), whole.values.nan_to_num(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    tokens = clip(extra=1).to(dtype)
    packed = flashvid(tokens, GRIDS, extra_rows=1, budget="30%", weights=torch.ones(len(tokens)))
    check(packed, vtok.plan(GRIDS, budget="30%"), tokens, 1)
    assert packed.values.dtype == dtype and packed.weight.dtype == torch.float32


def test_weights_of_earlier_rounds_add_up():
    tokens = torch.randn(2, 6, 10, 8)
    one = flashvid(tokens, budget=30)
    two = flashvid(one.values, Layout.from_grid([(1, 1, 30)] * 2), budget=8, weights=one.weight)
    assert two.weight.sum() == one.weight[two.assignment >= 0].sum()
    both = one.then(two)
    assert torch.equal(both.weight, two.weight) and both.shares is None
    assert torch.allclose(both.reduce(tokens.flatten(0, 2)), two.values, atol=1e-5)


def test_gradients_are_those_of_the_merge():
    tokens = torch.randn(1, 5, 8, 6, dtype=torch.float64, requires_grad=True)
    packed = flashvid(tokens, budget=12)
    packed.values.sum().backward()
    gone = (packed.assignment == -1).view(5, 8)
    assert (tokens.grad[0][gone] == 0).all() and tokens.grad.sum() == pytest.approx(12 * 6)


def test_one_graph():
    one_graph(method="flashvid", budget=7), one_graph(method="flashvid", budget="30%")


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (1, 1, 1, 1), (0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)], ids=str)
def test_no_value_is_read_on_the_host_and_nothing_is_too_small(shape):
    kept = flashvid(torch.randn(shape), budget=5)
    assert kept.values.shape[0] == min(5, shape[1] * shape[2]) * shape[0]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = flashvid(torch.randn(shape), budget=5)
        assert (fake.values.shape, fake.assignment.shape) == (kept.values.shape, kept.assignment.shape)


def test_windows_of_a_stream():
    tokens = torch.randn(2, 9, 6, 8)
    stream = Stream("flashvid", window=4, budget=7)
    first, last = stream.push(tokens), stream.flush()
    assert torch.equal(first.values[7:14], flashvid(tokens[:1, 4:8], budget=7).values)
    assert last.values.shape == (12, 8)
    assert torch.equal(Compressor(method="flashvid", budget=7)(tokens[:, :4]).values[:7], first.values[:7])


def test_errors():
    tokens = torch.randn(1, 4, 6, 8)
    for text, change in [
        ("a budget, got a threshold", {"threshold": 0.5}),
        ("attention of floats", {"attention": torch.rand(3)}),
        ("attention of floats", {"attention": torch.ones(24, dtype=torch.int64)}),
        ("segments >= 1", {"segments": 0}),
        ("temporal >= 0", {"temporal": math.nan}),
        ("temporal >= 0", {"temporal": -0.5}),
        ("selected as a share", {"selected": 1.5}),
        ("compat None or 'flashvid', got True", {"compat": True}),
    ]:
        with pytest.raises(ValueError, match=f"method 'flashvid': expected .*{text}"):
            flashvid(tokens, **({"budget": 6} | change if "threshold" not in change else change))
