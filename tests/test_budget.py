"""Budgets: every form meets its count exactly, in integers, before any tensor exists."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok import Layout, Plan, plan
from vtok.budget import allocate, rows_of, share
from vtok.decide import largest_below

GRIDS = [(8, 2, 3), (1, 4, 4), (0, 2, 2), (5, 1, 7)]  # 48, 16, 0 and 35 rows
grids = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4), st.integers(1, 5)), max_size=5)
shares = st.one_of(
    st.fractions(Fraction(1, 10**6), 1),
    st.floats(1e-6, 1.0),
    st.integers(1, 100).map("{}%".format),
)


@pytest.mark.parametrize(
    "budget, rows",
    [
        (10, [10, 10, 0, 10]),
        (40, [40, 16, 0, 35]),
        ("25%", [12, 4, 0, 8]),
        ("12.5%", [6, 2, 0, 4]),
        (Fraction(1, 3), [16, 5, 0, 11]),
        (0.1, [4, 1, 0, 3]),
        (1.0, [48, 16, 0, 35]),
        ([48, 0, 5, 2], [48, 0, 0, 2]),
        (["50%", 3, 1, 0.2], [24, 3, 0, 7]),
        ([[6, 5, 4, 3, 2, 1, 0, 9], [7], [], [1] * 5], [27, 7, 0, 5]),
        ([[1] * 8, 3, 4, "10%"], [8, 3, 0, 3]),
    ],
    ids=repr,
)
def test_every_form(budget, rows):
    assert plan(GRIDS, budget=budget, method="evs") == rows


def test_a_float_is_the_decimal_it_prints_as():
    """int(3840 * (1 - 0.9)) is 383 in doubles; a tenth of 3840 rows is 384."""
    assert rows_of("budget", 0.1, 3840) == 384
    assert rows_of("budget", 0.29, 100) == 29  # int(0.29 * 100) is 28
    assert rows_of("budget", 0.1 + 0.2, 10) == 3
    assert share("budget", 1e-05) == Fraction(1, 100000)


def test_total_budget_by_largest_remainder():
    assert plan(GRIDS, total_budget=50) == [24, 8, 0, 18]  # exact parts 24.24, 8.08, 0, 17.68
    assert plan([(1, 1, 5)] * 3, total_budget=7) == [3, 2, 2]
    assert plan(GRIDS, total_budget="50%") == [24, 8, 0, 17]
    assert plan(GRIDS, total_budget=1000) == [48, 16, 0, 35]


def test_context_bounds_the_whole_batch():
    assert plan(GRIDS, budget="50%", context=100, text_tokens=51) == [24, 8, 0, 17]
    assert sum(plan(GRIDS, budget="50%", context=100, text_tokens=80)) == 20
    assert sum(plan(GRIDS, context=64)) == 64
    assert plan(GRIDS, context=64, min_per_frame=3)[1] >= 3
    assert plan([(0, 2, 2)], budget=4, context=10, text_tokens=20) == [0]
    with pytest.raises(ValueError, match="expected text_tokens below context=10, got 10: no row fits"):
        plan(GRIDS, budget=4, context=10, text_tokens=10)
    with pytest.raises(ValueError, match="min_per_frame=2 needs 28 rows, the context leaves 20"):
        plan(GRIDS, context=30, text_tokens=10, min_per_frame=2)


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        ({"budget": 0}, ValueError, "expected budget of at least 1, got 0"),
        ({"budget": -3}, ValueError, "expected budget of at least 1, got -3"),
        ({"budget": True}, TypeError, "expected budget as an integer, got True"),
        ({"budget": 1.5}, ValueError, r"expected budget as a share in \(0, 1\], got 1.5 \(a number of rows is an int"),
        ({"budget": 0.0}, ValueError, r"expected budget as a share in \(0, 1\], got 0.0"),
        ({"budget": math.nan}, ValueError, "expected budget as rows"),
        ({"budget": math.inf}, ValueError, "expected budget as rows"),
        ({"budget": "25"}, ValueError, "expected budget as rows .* got '25'"),
        ({"budget": "a%"}, ValueError, "expected budget as rows .* got 'a%'"),
        ({"budget": "1/0%"}, ValueError, "expected budget as rows"),
        ({"budget": "120%"}, ValueError, r"expected budget as a share in \(0, 1\], got '120%'"),
        ({"budget": [1, 2]}, ValueError, r"expected budget with one entry per video \(4\), got 2"),
        ({"budget": [[1], 1, 1, 1]}, ValueError, r"expected budget with one entry per frame \(8\), got 1"),
        ({"budget": [-1, 1, 1, 1]}, ValueError, "expected budget of at least 0, got -1"),
        ({"budget": torch.tensor(3.0)}, TypeError, "expected budget as an integer"),
        ({"budget": 4, "total_budget": 4}, ValueError, "expected one of budget and total_budget, got both"),
        ({"total_budget": 0}, ValueError, "expected total_budget of at least 1, got 0"),
        ({"budget": 4, "min_per_frame": -1}, ValueError, "expected min_per_frame of at least 0, got -1"),
        ({"budget": 12, "min_per_frame": 2}, ValueError, "min_per_frame=2 needs 16 rows of video 0, budget gives 12"),
        ({"total_budget": 20, "min_per_frame": 2}, ValueError, "min_per_frame=2 needs 28 rows, total_budget gives 20"),
        (
            {"budget": [[1] * 8, 9, 9, 9], "min_per_frame": 2},
            ValueError,
            "min_per_frame=2 needs that many rows of each",
        ),
        ({"budget": 4, "method": "nothing"}, ValueError, r"expected one of the methods .*'evs', .*got 'nothing'"),
    ],
)
def test_errors(kwargs, error, text):
    with pytest.raises(error, match=text):
        plan(GRIDS, **kwargs)


@pytest.mark.parametrize(
    "weights, total, rows",
    [([1, 2, 3, 4], 17, [2, 3, 5, 7]), ([1, 1, 1], 10, [4, 3, 3]), ([0.5, 0.25, 0.25], 7, [3, 2, 2])],
)
def test_largest_remainder(weights, total, rows):
    assert allocate(weights, total) == rows


def test_largest_remainder_of_odd_weights():
    assert allocate([0, 0, 0], 5) == [2, 2, 1]
    assert allocate([math.nan, 1], 4) == [0, 4]
    assert allocate([1, 10**18], 10, floors=[3, 0], caps=[5, 6]) == [4, 6]
    assert allocate([], 5) == []
    with pytest.raises(ValueError, match="expected weights that are finite and not negative"):
        allocate([1, -1], 2)
    with pytest.raises(ValueError, match="expected floors within caps that sum to at most 3"):
        allocate([1, 1], 3, floors=[2, 2])


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_allocation_is_exact_bounded_and_monotone(data):
    caps = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=8))
    floors = [data.draw(st.integers(0, cap)) for cap in caps]
    weights = [data.draw(st.integers(0, 50)) for _ in caps]
    total = data.draw(st.integers(sum(floors), 300))
    rows = allocate(weights, total, floors=floors, caps=caps)
    assert sum(rows) == min(total, sum(caps))
    assert all(f <= r <= c for f, r, c in zip(floors, rows, caps, strict=True))
    free = allocate(weights, total)
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    assert all(free[i] >= free[j] for i, j in pairwise(order))


@settings(deadline=None, max_examples=60)
@given(grids, st.one_of(shares, st.integers(1, 60)), st.integers(0, 3), st.booleans())
def test_inside_a_graph_the_arithmetic_is_the_same(grids, budget, extra, whole_batch):
    layout = Layout.from_grid(grids, extra_rows=extra)
    kwargs = {"total_budget" if whole_batch else "budget": budget}
    host, graph = Plan.of(layout, **kwargs), Plan.in_graph(layout, **kwargs)
    assert (host.total, host.k, host.longest) == (graph.total, graph.k, graph.longest)
    for name in ("rows", "cu_seqlens", "segments", "cu_k"):
        assert torch.equal(getattr(host, name), getattr(graph, name))


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(0, 5)] * 4), st.one_of(shares, st.integers(1, 40)), st.booleans())
def test_inside_a_graph_dense_batches_too(shape, budget, whole_batch):
    kwargs = {"total_budget" if whole_batch else "budget": budget}
    host, graph = Plan.of(Layout.uniform(*shape), **kwargs), Plan.in_graph(Layout.uniform(*shape), **kwargs)
    assert host.k == graph.k
    assert torch.equal(host.cu_k, graph.cu_k)


@settings(deadline=None, max_examples=300)
@given(st.fractions(Fraction(1, 10**17), 1), st.integers(1, 60))
def test_shares_are_reduced_without_changing_a_count(part, limit):
    below = largest_below(part, limit)
    assert below <= part
    assert below.denominator <= limit
    assert all(n * below.numerator // below.denominator == math.floor(n * part) for n in range(limit + 1))
