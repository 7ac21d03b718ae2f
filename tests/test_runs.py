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
    assert packed.assignment.tolist() == [0, 1, 2, 3, -1, -1]


CAPPED = ["temporal_merge", "dtd", "mavors", "framefusion", "sttm", "scissor", "longvu_stc", "b_vllm"]


@pytest.mark.parametrize("capacity", [0, 3, 7])
@pytest.mark.parametrize("method", CAPPED)
def test_rows_within_the_capacity_are_what_they_are_with_room(method, capacity):
    torch.manual_seed(1)
    tokens, threshold = torch.randn(2, 5, 2, 3, 4), 0.8 if method in ("scissor", "b_vllm") else 0.3
    options = {"b_vllm": {"distributions": torch.randn(10, 2)}, "mavors": {"chunk": 2}}.get(method, {})
    whole = compress(tokens, threshold=threshold, method=method, **options).trim()
    packed = compress(tokens, threshold=threshold, method=method, capacity=capacity, **options)
    assert capacity < len(whole.values) < 60 and packed.counts.tolist() == whole.counts.tolist()
    assert torch.equal(packed.values, whole.values[:capacity]) and torch.equal(packed.weight, whole.weight[:capacity])
    assert torch.equal(packed.assignment, whole.assignment.where(whole.assignment < capacity, torch.tensor(-1)))


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


def mean_of(tokens, sizes, assignment, k):
    """Weighted means in float64, and what they weigh."""
    where = (assignment >= 0).nonzero()[:, 0]
    weight = torch.zeros(k).double().index_add(0, assignment[where], sizes[where].double())
    total = torch.zeros(k, tokens.shape[1]).double()
    total.index_add_(0, assignment[where], tokens[where].double() * sizes[where, None].double())
    return total / weight[:, None].clamp(min=1), weight


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("first", [{"budget": 14, "method": "temporal_merge"}, {"budget": 11, "method": "evs"},
                                   {"budget": 9, "method": "dtd"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("second", ["temporal_merge", "dtd", "evs"])
def test_two_rounds_are_one(first, second, extra):
    layout, tokens = Layout.from_grid(GRIDS, extra_rows=extra), still(GRIDS, extra=extra)
    sizes = torch.randint(1, 4, (layout.total,)).float()
    one = compress(tokens, layout, weights=sizes, **first).trim()
    rows = Layout.from_grid([(k, 1, 1) for k in one.cu_seqlens.diff().tolist()])
    two = compress(one.values, rows, weights=one.weight, method=second, budget="60%")
    both = one.then(two)
    assert both.layout is layout and torch.equal(both.values, two.values) and torch.equal(both.weight, two.weight)
    assert torch.equal(both.index, one.index[two.index]) and torch.equal(both.cu_seqlens, two.cu_seqlens)
    assert torch.equal(both.assignment[both.index], torch.arange(len(both.index)))
    assert torch.equal(both.positions, layout.positions(both.index)) and torch.equal(both.sizes, sizes)
    members, weight = mean_of(tokens, sizes, both.assignment, len(both.index))
    assert torch.equal(both.weight.double(), weight)
    if first["method"] == "temporal_merge" and second == "temporal_merge":
        assert torch.allclose(both.values, members.float(), atol=1e-5)
        assert torch.allclose(both.reduce(tokens.double()), members) and both.is_merged
    assert torch.allclose(both.reduce(tokens), both.values, atol=1e-5)  # also where one round took rows as they are
    for alone, whole in zip(both.split(), range(4), strict=True):
        part = slice(*layout.cu_seqlens[whole : whole + 2].tolist())
        assert torch.equal(alone.sizes, sizes[part])


def test_rounds_that_do_not_fit():
    tokens = torch.randn(2, 4, 3, 5)
    one = compress(tokens, budget=6, method="temporal_merge")
    rows = Layout.from_grid([(6, 1, 1)] * 2)
    with pytest.raises(ValueError, match=r"expected a later round with weights=packed.weight"):
        one.then(compress(one.values, rows, budget=2, method="temporal_merge"))
    with pytest.raises(ValueError, match="expected a later round of 12 rows of 2 videos, got 12 of 1"):
        one.then(compress(one.values, [(12, 1, 1)], budget=2))
    assert one.then(compress(one.values, rows, budget=2)).weight.shape == (4,)
    padded = compress(tokens, threshold=9.0, scores=torch.arange(24.0).flip(0).sub(13.5), capacity=3)
    assert padded.then(compress(padded.values, [(1, 1, 1), (2, 1, 1)], budget=1)).index.tolist() == [0, -1]
    none = compress(torch.randn(1, 0, 3, 5), budget=6)
    assert none.then(compress(none.values, [(0, 1, 1)], budget=2)).assignment.shape == (0,)
    for wrong, error in (([1.0] * 24, TypeError), (torch.ones(24).double(), TypeError), (torch.ones(5), ValueError)):
        with pytest.raises(error, match="expected weights"):
            compress(tokens, budget=6, weights=wrong)


@pytest.mark.parametrize("method", ["temporal_merge", "dtd"])
def test_attention_over_merged_equals_is_attention_over_all(method):
    still_clip = torch.randn(1, 1, 3, 16).repeat(1, 6, 1, 1)
    still_clip[:, 4:] += torch.randn(1, 1, 3, 16)
    keys, query = still_clip.flatten(0, 2), torch.randn(1, 4, 16)
    packed = compress(still_clip, threshold=0.999, capacity=9, method=method)
    assert packed.size_bias().tolist() == pytest.approx([math.log(4)] * 3 + [math.log(2)] * 3 + [-math.inf] * 3)

    def attend(rows, bias=None):
        return torch.nn.functional.scaled_dot_product_attention(query, rows[None], rows[None], bias)

    assert torch.allclose(
        attend(packed.values, packed.size_bias()[None, None].expand(1, 4, -1)), attend(keys), atol=1e-5
    )
