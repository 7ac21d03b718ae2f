"""Methods that merge: runs in time, exact budgets, weights, and the way back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok import Layout, compress
from vtok.sites import held, runs

GRIDS = [(4, 2, 3), (0, 2, 2), (1, 3, 2), (6, 1, 5)]


def still(grids, jump=0.3, channels=9, extra=0):
    """Tokens that stay what they were, but for some that change."""
    rows = []
    for t, h, w in grids:
        change = torch.rand(t, h * w, 1) < jump
        x = torch.randn(t, h * w, channels)
        for f in range(1, t):
            x[f] = torch.where(change[f], x[f], x[f - 1])
        rows += [x.flatten(0, 1), torch.randn(extra, channels)]
    return torch.cat(rows)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 2), st.integers(1, 3)), max_size=3),
    st.integers(0, 2),
    st.data(),
)
def test_runs_and_held_walk_each_site(grids, extra, data):
    layout = Layout.from_grid(grids, extra_rows=extra)
    kept = [row for row in range(layout.total) if data.draw(st.booleans())]
    index = torch.tensor([*kept, -1], dtype=torch.int64)
    slots = {row: k for k, row in enumerate(kept)}
    want, both, start = {}, {}, 0
    for t, h, w in grids:
        columns = [[start + f * h * w + site for f in range(t)] for site in range(h * w)]
        columns += [[start + t * h * w + i] for i in range(extra)]
        for column in columns:
            for f, row in enumerate(column):
                before = [slots[r] for r in column[: f + 1] if r in slots]
                after = [slots[r] for r in column[f:] if r in slots]
                want[row] = before[-1] if before else -1
                both[row] = before[-1] if before else after[0] if after else -1
        start += t * h * w + extra
    assert runs(index, layout).tolist() == [want[row] for row in range(layout.total)]
    assignment = torch.tensor([slots.get(row, -1) for row in range(layout.total)], dtype=torch.int64)
    assert held(assignment, layout).tolist() == [both[row] for row in range(layout.total)]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("reduce", ["mean", "first"])
@pytest.mark.parametrize("goal", [{"threshold": 0.999}, {"budget": 25}, {"budget": ["50%", 1, 6, 12]}], ids=str)
def test_every_token_is_the_mean_of_its_run(goal, reduce, extra):
    layout = Layout.from_grid(GRIDS, extra_rows=extra)
    tokens = still(GRIDS, extra=extra)
    packed = compress(tokens, layout, method="temporal_merge", reduce=reduce, **goal).trim()
    assert packed.weight.sum() == layout.total and (packed.assignment >= 0).all()
    assert torch.equal(packed.assignment[packed.index], torch.arange(packed.index.shape[0]))
    for k, row in enumerate(packed.index.tolist()):
        members = tokens[packed.assignment == k]
        assert packed.weight[k] == members.shape[0]
        want = members.double().mean(0).float() if reduce == "mean" else tokens[row]
        assert torch.allclose(packed.values[k], want, atol=1e-6)
    assert torch.equal(packed.unmerge(), packed.values[packed.assignment])
    if "threshold" in goal:  # what is alike to the bit is rebuilt
        assert torch.allclose(packed.unmerge(), tokens, atol=1e-5)
    if goal == {"budget": 25}:
        assert packed.cu_seqlens.diff().tolist() == [24 + extra, extra, 6 + extra, 25 + extra]


def test_thresholds_at_the_ends():
    tokens = torch.randn(1, 5, 4, 6)
    everything = compress(tokens, threshold=math.inf, method="temporal_merge").trim()
    assert torch.equal(everything.values, tokens.flatten(0, 2)) and (everything.weight == 1).all()
    means = compress(tokens, threshold=-1.1, method="temporal_merge").trim()
    assert means.index.tolist() == [0, 1, 2, 3] and (means.weight == 5).all()
    assert torch.allclose(means.values, tokens[0].mean(0), atol=1e-6)


def test_slow_drift_needs_a_reference_that_stays():
    angle = torch.arange(30) * 0.05
    tokens = torch.stack([angle.cos(), angle.sin()], -1)[None, :, None]
    kept = {
        reference: compress(tokens, threshold=0.99, method="temporal_merge", reference=reference).trim().index.shape[0]
        for reference in ("previous", "last_kept", "run_mean")
    }
    assert kept["previous"] == 1 and kept["last_kept"] == 10 and 5 <= kept["run_mean"] < 10


def test_a_static_clip_in_bfloat16_loses_nothing():
    tokens = torch.randn(1, 1, 3, 64).bfloat16().repeat(1, 200, 1, 1)
    packed = compress(tokens, threshold=0.9, method="temporal_merge").trim()
    assert torch.equal(packed.values, tokens[0, 0]) and packed.weight.tolist() == [200] * 3


def test_refresh_opens_runs():
    tokens = torch.ones(1, 7, 2, 4)
    packed = compress(tokens, threshold=0.5, method="temporal_merge", refresh=3).trim()
    assert packed.positions[:, 0].tolist() == [0, 0, 3, 3, 6, 6] and packed.weight.tolist() == [3, 3, 3, 3, 1, 1]


def test_capacity_drops_whole_runs():
    packed = compress(torch.randn(1, 3, 2, 4), threshold=1.0, method="temporal_merge", capacity=4)
    assert packed.counts.tolist() == [6] and packed.index.tolist() == [0, 1, 2, 3]
    assert packed.assignment.tolist() == [0, 1, 2, 3, 2, 3]


def test_gradients_share_the_mean():
    tokens = torch.ones(1, 4, 1, 3, requires_grad=True)
    compress(tokens, budget=2, method="temporal_merge").values[0].sum().backward()
    assert tokens.grad[0, :, 0, 0].tolist() in ([1.0, 0, 0, 0], [pytest.approx(1 / 3)] * 3 + [0])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"budget": 4, "reference": "run_mean"}, "expected reference 'previous' under a budget, got reference 'run_m"),
        ({"budget": 4, "refresh": 2}, "expected reference 'previous' under a budget"),
        ({"budget": 4, "reduce": "max"}, "expected reduce 'mean' or 'first', got 'max'"),
    ],
)  # fmt: skip
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        compress(torch.randn(1, 3, 2, 4), method="temporal_merge", **options)


def test_one_graph():
    torch._dynamo.reset()
    tokens = torch.randn(2, 5, 4, 8)
    call = lambda x: compress(x, budget=9, method="temporal_merge")  # noqa: E731
    packed, want = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")(tokens), call(tokens)
    assert torch.equal(packed.values, want.values) and torch.equal(packed.assignment, want.assignment)
