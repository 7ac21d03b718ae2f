"""optimal: no cutting of a video into as many runs loses less, but by its gap."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_run_curve import cost_table, least_sums

from vtok import Layout, Packed, Plan, Stream, compress

from rooms import ROOT

GRIDS = [(7, 2, 3), (0, 2, 2), (1, 3, 2), (6, 1, 5), (3, 2, 2)]
SITES = [6, 0, 6, 5, 4]


def scenes(grids, extra=0, channels=9):
    """Tokens that drift, with cuts, some sites still and some that flicker."""
    rows = []
    for t, h, w in grids:
        x = 0.3 * torch.randn(t, h * w, channels).cumsum(0) + torch.randn(h * w, channels)
        x[t // 3 :] += 2 * torch.randn(h * w, channels) * (torch.rand(h * w, 1) < 0.5)
        x[::2] += torch.randn(channels) * (torch.rand(h * w, 1) < 0.3)
        rows += [x.flatten(0, 1), torch.randn(extra, channels)]
    return torch.cat(rows)


def error(packed, tokens, weights=None, fill="zero"):
    """The summed squared distance of what comes back, in float64."""
    assignment = packed.assignment
    back = packed.unmerge(fill=fill).double()
    if fill == "zero" and packed.is_merged:  # the means in float64
        w = (torch.ones(len(tokens)) if weights is None else weights).double()
        total = torch.zeros(len(packed.index), tokens.shape[1]).double()
        total.index_add_(0, assignment, tokens.double() * w[:, None])
        weight = torch.zeros(len(packed.index)).double().index_add(0, assignment, w)
        back = (total / weight.clamp(min=1e-30)[:, None])[assignment]
        return float((w[:, None] * (back - tokens.double()).square()).sum())
    return float((back - tokens.double()).square().sum())


def least_error(tokens, grids, budgets, weights=None, extra=0):
    """The least error of any runs, by float64 and every division of the budget: of each video, or of all for an int."""
    w, start, curves = (torch.ones(len(tokens)) if weights is None else weights).double(), 0, []
    for t, h, n in grids:
        rows = [[start + f * h * n + s for f in range(t)] for s in range(h * n if t else 0)]
        curves.append([least_sums(cost_table(tokens[r].double(), w[r])) for r in rows])
        start += t * h * n + extra
    if isinstance(budgets, int):
        curves, budgets = [[curve for video in curves for curve in video]], [budgets]
    return sum(divided(video, k) for video, k in zip(curves, budgets, strict=True))


def divided(curves, budget):
    least = [0.0] + [math.inf] * budget
    for curve in curves:
        least = [min((least[b - k] + d for k, d in enumerate(curve, 1) if k <= b), default=math.inf)
                 for b in range(budget + 1)]  # fmt: skip
    return least[budget]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 2), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(0, 2), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99), st.data(),
)  # fmt: skip
def test_no_runs_lose_less(grids, extra, shared, whole, weighted, seed, data):
    """Budgets are met exactly; the error is within gap of the best, and with exact=True it is the best."""
    layout, sites = Layout.from_grid(grids, extra_rows=extra), [h * w if t else 0 for t, h, w in grids]
    torch.manual_seed(seed)
    tokens = torch.randint(-2, 3, (layout.total, 3)).float() if whole else scenes(grids, extra, 4)
    weights = torch.randint(1, 4, (layout.total,)).float() if weighted else None
    budget = [data.draw(st.integers(n, n * t)) for (t, _, _), n in zip(grids, sites, strict=True)]
    if shared and not sum(budget):
        return
    kept = sum(budget)
    rule = {"total_budget": kept} if shared else {"budget": budget}
    best = least_error(tokens, grids, kept if shared else budget, weights, extra)
    slack = 1e-4 * (1 + float((tokens.square().sum(-1) * (1 if weights is None else weights)).sum()))
    for exact in (False, True):
        packed = compress(tokens, layout, method="optimal", exact=exact, weights=weights, **rule)
        assert len(packed.index) == kept + extra * len(grids) == packed.cu_seqlens[-1] and (packed.index >= 0).all()
        assert (packed.index.diff() > 0).all() and (packed.assignment >= 0).all()
        assert torch.equal(packed.assignment[packed.index], torch.arange(len(packed.index)))
        if not shared:
            assert packed.cu_seqlens.diff().tolist() == [k + extra for k in budget]
        lost = error(packed, tokens, weights)
        assert packed.gap.shape == () and packed.gap.dtype == torch.float64 and packed.gap >= 0
        assert best - slack <= lost <= best + float(packed.gap) + slack
        if exact:
            assert lost <= best + slack
    assert packed.longest >= packed.cu_seqlens.diff().max() and packed.padded()[1].sum() == len(packed.index)


def test_the_search_finds_what_the_hull_cannot():
    """Two cuts of a bump gain the most, but there is one: it gains more at the other site."""
    bump, edge = [0.0, 0, 8, 0, 0, 0], [0.0, 0, 0, 0, 0, 4.5]
    tokens = torch.tensor([bump, edge]).T.reshape(1, 6, 2, 1)
    found = {exact: compress(tokens, budget=3, method="optimal", exact=exact) for exact in (False, True)}
    flat = tokens.flatten(0, 2)
    lost = {exact: error(packed, flat) for exact, packed in found.items()}
    best = least_error(flat, [(6, 1, 2)], [3])
    assert lost[True] == pytest.approx(best) and lost[False] > best + 0.1
    assert lost[False] <= best + float(found[False].gap) and found[True].gap > 0  # a bound, not the distance


def others(tokens, layout, budget):
    """What the other methods that work along time lose, dropped rows held."""
    for method in ("temporal_merge", "evs", "dtd", "dycoke", "longvu_stc", "framefusion", "uniform", "random"):
        packed = compress(tokens, layout, method=method, budget=budget)
        yield method, error(packed, tokens, fill="hold")


def golden_clip():
    path = next((ROOT / "tests" / "golden" / "tokens").glob("dtd_feature__t8*.npz"))
    arrays = np.load(path)
    return max((torch.from_numpy(arrays[name]).float() for name in arrays.files if arrays[name].ndim >= 2), key=len)


@pytest.mark.parametrize("share", ["30%", "50%", "80%"])
@pytest.mark.parametrize("kind", ["noise", "scenes", "golden"])
def test_nobody_loses_less(kind, share):
    grids = [(8, 4, 4)] if kind == "golden" else [(9, 2, 3), (12, 3, 2)]
    layout = Layout.from_grid(grids)
    tokens = {"noise": lambda: torch.randn(layout.total, 16), "scenes": lambda: scenes(grids, channels=16),
              "golden": lambda: golden_clip().reshape(layout.total, -1)}[kind]()  # fmt: skip
    packed = compress(tokens, layout, method="optimal", budget=share)
    for method, lost in others(tokens, layout, share):
        assert error(packed, tokens) <= lost + 1e-3, method


def test_one_budget_for_the_batch_goes_where_it_helps():
    layout = Layout.from_grid([(6, 1, 4), (6, 1, 4)])
    tokens = scenes([(6, 1, 4)] * 2)
    tokens[:24] = tokens[:4].repeat(6, 1)  # nothing moves
    packed = compress(tokens, layout, total_budget=16, method="optimal")
    assert packed.cu_seqlens.tolist() == [0, 4, 16] and packed.longest >= 12
    assert [p.index.shape[0] for p in packed.split()] == [4, 12]
    each = compress(tokens, layout, budget=8, method="optimal")
    assert error(packed, tokens) < error(each, tokens)


def test_gaps_of_videos_add_up():
    one = torch.tensor([[0.0, 0, 8, 0, 0, 0], [0.0, 0, 0, 0, 0, 4.5]]).T.reshape(1, 6, 2, 1)
    first, second, both = (
        compress(x, budget=3, method="optimal").gap for x in (one, 3 * one, torch.cat([one, 3 * one]))
    )
    assert first > 0 and second == pytest.approx(9 * first) and both == pytest.approx(first + second)


def test_rounds_add_up_by_weight():
    layout, tokens = Layout.from_grid([(8, 1, 3)]), scenes([(8, 1, 3)])
    one = compress(tokens, layout, budget=24, method="optimal")
    two = compress(one.values, layout, budget=9, method="optimal", weights=one.weight)
    assert torch.equal(two.index, compress(tokens, layout, budget=9, method="optimal").index)
    assert torch.allclose(one.then(two).values, compress(tokens, layout, budget=9, method="optimal").values)


def test_sites_that_are_not_finite_come_last():
    tokens = scenes([(5, 1, 4)])
    tokens[1], tokens[10] = math.nan, math.inf
    for exact in (False, True):
        packed = compress(tokens, [(5, 1, 4)], budget=11, method="optimal", exact=exact)
        sites = (packed.index % 4).bincount().tolist()
        assert sites[1] == sites[2] == 1 and sum(sites) == 11 and packed.gap.isfinite()
    packed = compress(tokens, [(5, 1, 4)], budget=14, method="optimal")  # 2 more are left: the first frames open
    assert (packed.index[packed.index % 4 == 1] // 4).tolist() == [0, 1, 2]


def test_nothing_and_everything():
    assert compress(torch.randn(1, 0, 3, 4), budget=2, method="optimal").gap == 0
    assert compress(torch.randn(0, 4, 3, 4), budget=5, method="optimal").values.shape == (0, 4)
    one = torch.randn(1, 1, 3, 4)
    assert torch.equal(compress(one, budget=3, method="optimal").values, one.flatten(0, 2))
    still = torch.randn(1, 1, 3, 4).repeat(1, 5, 1, 1)
    packed = compress(still, budget=7, method="optimal", exact=True)
    assert packed.gap == 0 and torch.allclose(packed.unmerge(), still.flatten(0, 2), rtol=1e-6)
    moving = torch.randn(2, 70, 3, 4, dtype=torch.float16)
    packed = compress(moving, budget="100%", method="optimal")
    assert torch.equal(packed.values, moving.flatten(0, 2)) and packed.gap == 0


def test_gradients_are_those_of_the_means():
    tokens = torch.tensor([0.0, 0, 9, 9])[None, :, None, None].requires_grad_()
    compress(tokens, budget=2, method="optimal").values.sum().backward()
    assert tokens.grad.flatten().tolist() == [0.5] * 4


def test_the_gap_is_saved_and_goes_along(tmp_path):
    packed = compress(scenes(GRIDS, 1), GRIDS, extra_rows=1, budget=[9, 0, 6, 11, 5], method="optimal")
    packed.save(tmp_path / "kept.safetensors")
    assert Packed.load(tmp_path / "kept.safetensors").gap == packed.trim().gap == packed.gap
    assert packed.split()[0].gap is None
    assert compress(torch.randn(2, 3, 4, 5), budget=4).gap is None


def test_in_windows():
    tokens, stream = torch.randn(1, 8, 3, 5), Stream("optimal", window=4, budget=6)
    packed = stream.push(tokens)
    assert packed.cu_seqlens.tolist() == [0, 6, 12]
    assert torch.equal(packed.values, compress(tokens.view(2, 4, 3, 5), budget=6, method="optimal").values)


def test_one_graph():
    torch._dynamo.reset()
    call = lambda x, g, plan: compress(x, g, budget=plan, method="optimal")  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for grids, budget in (([(4, 2, 4), (3, 2, 2)], 20), ([(70, 4, 4), (6, 2, 6), (9, 2, 2)], 30)):
            layout = Layout.from_grid(grids, extra_rows=1)
            tokens = torch.randn(layout.total, 20)
            packed, want = compiled(tokens, layout, budget), call(tokens, layout, budget)
            assert torch.equal(packed.index, want.index) and torch.equal(packed.values, want.values)
            assert packed.gap == want.gap


@pytest.mark.parametrize("rule", [{"budget": 9}, {"budget": "50%"}, {"total_budget": 17}], ids=str)
def test_one_graph_of_dense_tokens(rule):
    torch._dynamo.reset()
    call = lambda x: compress(x, method="optimal", **rule)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((2, 5, 4, 8), (2, 9, 3, 6)):
        tokens = torch.randn(shape)
        packed, want = compiled(tokens), call(tokens)
        assert torch.equal(packed.values, want.values) and torch.equal(packed.assignment, want.assignment)
        assert packed.longest == want.longest and packed.gap == want.gap


ERRORS = {
    "a row for each of the 6 sites, got a budget of 5": {"budget": [5, 0, 6, 9, 9]},
    "a row for each of the 21 sites, got a budget of 20": {"total_budget": 20},
    "a row for each of the 6 sites, got a budget of 4": {"budget": Fraction(1, 10)},
    "a budget, got a threshold": {"threshold": 0.5},
    "min_per_frame=0, got rows that each frame keeps": {"budget": "100%", "min_per_frame": 1},
    "a budget of each video or of all, got one of each frame": {"budget": [[3] * t for t, _, _ in GRIDS]},
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text):
    with pytest.raises(ValueError, match=f"method 'optimal': expected {text}"):
        compress(scenes(GRIDS), GRIDS, method="optimal", **ERRORS[text])


def test_errors_of_graphs_and_plans():
    tokens, layout = torch.randn(2, 4, 3, 5), Layout.uniform(2, 4, 1, 3)
    with pytest.raises(ValueError, match="a row for each of the 3 sites, got a budget of 2"):
        compress(tokens, layout, budget=Plan.of(layout, budget=2), method="optimal")
    with pytest.raises(Exception, match="expected exact=False inside a graph"):
        torch.compile(lambda x: compress(x, budget=5, method="optimal", exact=True), backend="eager", fullgraph=True)(
            tokens
        )


def test_runs_that_open_after_many_frames():
    tokens = (torch.arange(150) // 70).float()[:, None] * torch.ones(150, 3)
    packed = compress(tokens, [(150, 1, 1)], budget=3, method="optimal")
    assert packed.index.tolist() == [0, 70, 140]
