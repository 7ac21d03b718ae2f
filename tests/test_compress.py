"""compress: exact budgets, order, ties, floors and independence."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vtok
from vtok import Compressor, Layout, Plan, compress, methods
from vtok.budget import counts

GRIDS = [(3, 2, 4), (0, 2, 2), (1, 4, 4), (5, 1, 6)]
ragged = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 4)), max_size=4)
numbers = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.5, math.inf, -math.inf, math.nan])
budgets = st.one_of(st.integers(1, 40), st.integers(1, 100).map("{}%".format), st.floats(0.01, 1.0))


def best(rows, scores, k):
    """The k best of some rows: score descending, NaN last, ties to the lower row."""
    return sorted(rows, key=lambda r: (math.isnan(scores[r]), 0 if math.isnan(scores[r]) else -scores[r], r))[:k]


def oracle(grids, scores, quotas, least=0, extra=0):
    """The kept rows, one video and one frame at a time."""
    kept, start = [], 0
    for (t, h, w), quota in zip(grids, quotas, strict=True):
        frames = [list(range(start + f * h * w, start + (f + 1) * h * w)) for f in range(t)]
        first = quota if isinstance(quota, list) else [min(least, h * w)] * t
        chosen = [r for rows, k in zip(frames, first, strict=True) for r in best(rows, scores, k)]
        if not isinstance(quota, list):
            rest = [r for rows in frames for r in rows if r not in chosen]
            chosen += best(rest, scores, quota - len(chosen))
        start += t * h * w + extra
        kept += sorted(chosen) + list(range(start - extra, start))
    return kept


@settings(deadline=None, max_examples=150)
@given(ragged, budgets, st.integers(0, 3), st.integers(0, 2), st.data())
def test_budgets_are_exact_and_floors_hold(grids, budget, least, extra, data):
    layout = Layout.from_grid(grids, extra_rows=extra)
    scores = [data.draw(numbers) for _ in range(layout.total)]
    tokens = torch.randn(layout.total, 3)
    try:
        quotas = counts(grids, budget, None, least)
    except ValueError as error:
        assert "min_per_frame" in str(error)
        with pytest.raises(ValueError, match="min_per_frame"):
            compress(tokens, layout, budget=budget, min_per_frame=least, scores=torch.tensor(scores))
        return
    packed = compress(tokens, layout, budget=budget, min_per_frame=least, scores=torch.tensor(scores))
    assert packed.index.tolist() == oracle(grids, scores, quotas, least, extra)
    assert packed.cu_seqlens.diff().tolist() == [k + extra for k in quotas]
    assert torch.equal(packed.values, tokens[packed.index])


@settings(deadline=None, max_examples=80)
@given(ragged, st.integers(0, 2), st.integers(0, 1), st.data())
def test_nested_budgets_and_lists(grids, least, extra, data):
    layout = Layout.from_grid(grids, extra_rows=extra)
    scores = [data.draw(numbers) for _ in range(layout.total)]
    budget = [
        [data.draw(st.integers(min(least, h * w), h * w)) for _ in range(t)]
        if data.draw(st.booleans())
        else data.draw(st.integers(t * least, t * h * w + t * least))
        for t, h, w in grids
    ]
    packed = compress(
        torch.randn(layout.total, 2), layout, budget=budget, min_per_frame=least, scores=torch.tensor(scores)
    )
    assert packed.index.tolist() == oracle(grids, scores, counts(grids, budget, None, least), least, extra)


@settings(deadline=None, max_examples=40)
@given(ragged, st.integers(1, 60))
def test_total_budget_is_exact(grids, budget):
    layout = Layout.from_grid(grids)
    packed = compress(torch.randn(layout.total, 2), layout, total_budget=budget)
    assert packed.index.shape[0] == min(budget, layout.total)


@pytest.mark.parametrize("method", ["evs", "uniform", "random"])
@pytest.mark.parametrize("budget", [5, "30%", Fraction(1, 7), [3, 2, 9, 1]], ids=str)
def test_a_video_does_not_depend_on_the_rest_of_the_batch(method, budget):
    layout = Layout.from_grid(GRIDS)
    tokens = torch.randn(layout.total, 16, dtype=torch.bfloat16)
    whole = compress(tokens, layout, budget=budget, method=method)
    again = compress(tokens, layout, budget=budget, method=method)
    assert torch.equal(whole.index, again.index)
    cu = layout.cu_seqlens.tolist()
    for video, grid in enumerate(GRIDS):
        one = budget[video] if isinstance(budget, list) else budget
        alone = compress(tokens[cu[video] : cu[video + 1]], [grid], budget=[one], method=method)
        a, b = whole.cu_seqlens[video : video + 2].tolist()
        assert torch.equal(alone.index + cu[video], whole.index[a:b])
        assert torch.equal(alone.positions, whole.positions[a:b])


def test_dense_and_packed_tokens_agree():
    tokens = torch.randn(2, 5, 3, 4, 8)
    grid = [(5, 3, 4)] * 2
    want = compress(tokens.reshape(-1, 8), grid, budget=17)
    five = compress(tokens, budget=17)
    four = compress(tokens.flatten(2, 3), budget=17)
    known = compress(tokens.flatten(2, 3), [(5, 6, 8)] * 2, budget=17, merge_size=2)
    for got in (five, four, known):
        assert torch.equal(got.index, want.index)
        assert torch.equal(got.values, want.values)
    assert torch.equal(five.positions, want.positions)
    assert torch.equal(known.positions, want.positions)
    assert torch.equal(four.positions[:, 0], want.positions[:, 0])
    assert torch.equal(four.positions[:, 2], want.positions[:, 1] * 4 + want.positions[:, 2])


def test_positions_past_256_and_2048():
    tokens = torch.randn(1, 2100, 2, 4, dtype=torch.bfloat16)
    packed = compress(tokens, budget=2100, scores=torch.arange(4200.0))
    assert torch.equal(packed.positions[:, 0], torch.arange(2100, 4200) // 2)


def test_evs_keeps_what_changes():
    tokens = torch.randn(1, 1, 6, 8).repeat(1, 5, 1, 1)
    tokens[0, 3, 2] = -tokens[0, 3, 2]  # one site moves at frame 3 and back at frame 4
    packed = compress(tokens, budget=8)
    assert packed.index.tolist() == [0, 1, 2, 3, 4, 5, 20, 26]
    assert packed.scores[:6].isinf().all()
    assert packed.scores[20] == 2


def test_static_clip_keeps_the_first_frame_then_ties_in_order():
    tokens = torch.ones(1, 4, 6, 8)
    assert compress(tokens, budget=9).index.tolist() == list(range(9))
    assert compress(tokens, budget=9, min_per_frame=1).index.tolist() == [0, 1, 2, 3, 4, 5, 6, 12, 18]


def test_nan_tokens_come_last():
    tokens = torch.randn(1, 3, 4, 8)
    tokens[0, 1] = math.nan  # frame 1 has no score, and frame 2 none either: it is compared with frame 1
    assert compress(tokens, budget=6).index.tolist() == [0, 1, 2, 3, 4, 5]
    tokens[0, 0, 0] = math.nan
    assert compress(tokens, budget=4).index.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "budget, index",
    [
        (3, [0, 1, 2]),
        (4, [0, 1, 2, 3]),
        (8, [*range(4), *range(20, 24)]),
        (10, [*range(4), *range(12, 16), 24, 25]),
        (99, list(range(40))),
    ],
)
def test_uniform(budget, index):
    assert compress(torch.randn(1, 10, 4, 2), budget=budget, method="uniform").index.tolist() == index


def test_uniform_spreads_every_budget():
    for frames in range(1, 13):
        for budget in range(1, 3 * frames + 1):
            packed = compress(torch.zeros(1, frames, 3, 1), budget=budget, method="uniform")
            whole, rest = divmod(budget, 3)
            some = whole + (rest > 0)
            at = [i * frames // some for i in range(some)]
            want = [3 * f + site for i, f in enumerate(at) for site in range(3 if i < whole else rest)]
            assert packed.index.tolist() == want


def test_random_is_seeded_and_even():
    tokens = torch.zeros(1, 64, 64, 1)
    first = compress(tokens, budget=1024, method="random")
    assert torch.equal(first.index, compress(tokens, budget=1024, method="random", seed=0).index)
    assert not torch.equal(first.index, compress(tokens, budget=1024, method="random", seed=1).index)
    assert first.index[:8].tolist() == RANDOM_ROWS  # the same on every device and in every version
    per_frame, per_site = first.frame_counts, torch.bincount(first.index % 64, minlength=64)
    for spread in (per_frame, per_site):
        assert 4 < int(spread.min()) <= int(spread.max()) < 32  # 16 expected, sigma 3.5


RANDOM_ROWS = [2, 6, 9, 18, 19, 20, 23, 24]


@pytest.mark.parametrize("extra", [0, 1])
def test_threshold(extra):
    layout = Layout.from_grid(GRIDS, extra_rows=extra)
    tokens = torch.randn(layout.total, 8)
    scores = torch.randn(layout.total)
    scores[3], scores[4] = math.nan, 0.5
    packed = compress(tokens, layout, threshold=0.5, scores=scores)
    keep = (scores > 0.5) | layout.extra_mask()
    want = keep.nonzero()[:, 0]
    assert packed.index.shape[0] == layout.total
    assert torch.equal(packed.index[: len(want)], want)
    assert (packed.index[len(want) :] == -1).all()
    assert not packed.values[len(want) :].any()
    assert torch.equal(
        packed.counts, torch.tensor([int(part.sum()) for part in keep.tensor_split(layout.cu_seqlens)[1:-1]])
    )
    assert torch.equal(packed.cu_seqlens[1:], packed.counts.cumsum(0))
    assert torch.equal(packed.mask, keep)
    assert packed.trim().index.tolist() == want.tolist()


def test_threshold_overflow_is_visible():
    packed = compress(torch.randn(2, 4, 3, 8), threshold=-1.0, capacity=10)
    assert packed.counts.tolist() == [12, 12]
    assert packed.cu_seqlens.tolist() == [0, 10, 10]
    assert packed.index.tolist() == list(range(10))
    roomy = compress(torch.randn(2, 4, 3, 8), threshold=-1.0, capacity=30)
    assert roomy.index.tolist() == [*range(24), *[-1] * 6]
    assert roomy.cu_seqlens.tolist() == [0, 12, 24]


def test_threshold_with_a_floor():
    packed = compress(torch.randn(2, 4, 3, 8), threshold=math.inf, capacity=8, min_per_frame=1)
    assert packed.counts.tolist() == [4, 4]
    assert packed.frame_counts.tolist() == [1] * 8


def test_scores_and_callables_replace_the_method():
    tokens = torch.randn(2, 3, 4, 8)
    scores = tokens.reshape(-1, 8)[:, 0]
    given = compress(tokens, budget=5, scores=scores)
    called = compress(tokens, budget=5, scores=lambda rows, layout: rows[:, 0])
    assert torch.equal(given.index, called.index)
    assert torch.equal(given.index[:5], scores[:12].topk(5).indices.sort().values)


def test_gradients_reach_the_tokens_and_no_decision():
    tokens = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    packed = compress(tokens, budget=6)
    assert not packed.scores.requires_grad
    packed.values.sum().backward()
    want = torch.zeros(12, 5, dtype=torch.float64)
    want[packed.index] = 1
    assert torch.equal(tokens.grad.reshape(12, 5), want)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    scored = compress(tokens, budget=6, scores=lambda rows, _: rows.detach() @ weight)
    assert scored.scores.requires_grad  # a learned score stays reachable


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)], ids=str)
@pytest.mark.parametrize("method", ["evs", "uniform", "random"])
def test_empty_inputs(shape, method):
    packed = compress(torch.empty(shape), budget=5, method=method)
    rows = math.prod(shape[:3])
    assert packed.values.shape == (shape[0] * min(5, rows // max(shape[0], 1)), shape[3])
    assert packed.positions.shape == (packed.index.shape[0], 3)
    assert packed.padded()[0].shape[0] == shape[0]
    assert packed.unmerge(fill="hold").shape == (rows, shape[3])
    assert packed.frame_counts.shape == (shape[0] * shape[1],)


@pytest.mark.parametrize("method", ["evs", "uniform", "random"])
def test_one_frame(method):
    assert compress(torch.randn(1, 1, 6, 4), budget=6, method=method).index.tolist() == list(range(6))
    assert compress(torch.randn(1, 1, 6, 4), budget=2, method=method).index.shape == (2,)


X = torch.randn(2, 3, 4, 8)


@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        ((X,), {}, ValueError, "expected one of budget, total_budget and threshold"),
        ((X,), {"budget": 3, "total_budget": 3}, ValueError, "expected one of budget, total_budget and threshold"),
        (
            (X,),
            {"budget": 3, "threshold": 0.5},
            ValueError,
            "expected one of budget, total_budget and threshold, got more",
        ),
        ((X,), {"budget": 3, "capacity": 5}, ValueError, "expected capacity with a threshold only"),
        ((X,), {"threshold": 0.1, "capacity": -1}, ValueError, "expected capacity of at least 0, got -1"),
        ((X,), {"threshold": 0.1, "method": "uniform"}, ValueError, "'uniform': expected a budget, got a threshold"),
        ((X,), {"budget": 0}, ValueError, "expected budget of at least 1, got 0"),
        ((X,), {"budget": 3, "method": "nothing"}, ValueError, "expected one of the methods"),
        ((X,), {"budget": 3, "speed": 9}, TypeError, r"method 'evs': expected options among \(compat\), got speed"),
        ((X,), {"budget": 3, "query": X}, TypeError, r"method 'evs': expected options among \(compat\), got query"),
        ((X,), {"budget": 3, "compat": "x"}, ValueError, "method 'evs': expected compat None or 'vllm', got 'x'"),
        ((X,), {"budget": 3, "extra_rows": 1}, ValueError, "expected extra_rows=0 and merge_size=1 without grid_thw"),
        ((X.long(),), {"budget": 3}, TypeError, "method 'evs': expected tokens of a floating dtype, got torch.int64"),
        ((X[0, 0],), {"budget": 3}, ValueError, r"expected grid_thw with packed tokens \[S, D\], got None"),
        ((X[0],), {"budget": 3}, ValueError, r"expected tokens \[B, T, N, D\], .* got \(3, 4, 8\)"),
        (([1],), {"budget": 3}, TypeError, "expected tokens as a tensor, got list"),
        ((X[0, 0], [(2, 2, 2)]), {"budget": 3}, ValueError, "expected tokens of 8 rows, as grid_thw says, got 4"),
        ((X, Layout.uniform(2, 3, 2, 2)), {"budget": 3, "merge_size": 2}, ValueError, "when the Layout is made"),
        (
            (X, Layout.uniform(2, 3, 2, 2, "meta")),
            {"budget": 3},
            ValueError,
            "expected a Layout on cpu like the tokens",
        ),
        ((X,), {"budget": 3, "scores": torch.zeros(5)}, ValueError, r"expected scores of shape \(24,\), got \(5,\)"),
        (
            (X,),
            {"budget": 3, "scores": torch.zeros(24).long()},
            TypeError,
            "expected scores as a floating-point tensor",
        ),
        (
            (X,),
            {"budget": 3, "scores": torch.zeros(24), "seed": 1},
            TypeError,
            "expected no options with scores, got seed",
        ),
        (
            (X,),
            {"budget": Plan.of(Layout.uniform(2, 3, 4, 4), budget=3)},
            ValueError,
            "expected a Plan for 24 rows of 2",
        ),
    ],
)
def test_errors(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        compress(*args, **kwargs)


def test_a_repeated_budget_is_planned_once():
    layout = Layout.from_grid(GRIDS)
    tokens = torch.randn(layout.total, 4)
    compress(tokens, layout, budget=[3, 1, 2, 5], min_per_frame=1)
    first = layout._last[1]
    compress(tokens, layout, budget=[3, 1, 2, 5], min_per_frame=1)
    assert layout._last[1] is first
    assert compress(tokens, layout, budget=4).index.shape == (12,)


def test_compressor():
    module = Compressor(budget="25%", method="random", seed=3)
    tokens = torch.randn(2, 4, 6, 8)
    assert torch.equal(module(tokens).index, compress(tokens, budget="25%", method="random", seed=3).index)
    assert repr(module) == "Compressor(method='random', budget='25%', seed=3)"
    assert torch.equal(
        Compressor(budget=3)(tokens, scores=torch.arange(48.0)).index, torch.tensor([21, 22, 23, 45, 46, 47])
    )
    with pytest.raises(TypeError, match=r"method 'evs': expected options among \(compat\), got seed"):
        Compressor(budget=3, seed=1)
    with pytest.raises(ValueError, match="expected one of budget, total_budget and threshold"):
        Compressor()
    program = torch.export.export(module, (tokens,))
    assert torch.equal(program.module()(tokens).values, module(tokens).values)


def test_methods_are_registered_by_name():
    assert {"evs", "uniform", "random"} <= set(methods.names())
    assert methods.get("random").options == {"seed"}
    with pytest.raises(ValueError, match="expected a new method name, got 'evs'"):
        methods.register("evs")(lambda tokens, layout, plan: None)

    @methods.register("last")
    def last(tokens, layout, plan, *, reverse=False):
        row = torch.arange(layout.total, dtype=torch.float32)
        return -row if reverse else row

    try:
        assert compress(X, budget=2, method="last").index.tolist() == [10, 11, 22, 23]
        assert compress(X, budget=2, method="last", reverse=True).index.tolist() == [0, 1, 12, 13]
    finally:
        del methods._methods["last"]


def test_public_names():
    for name in vtok.__all__:
        assert getattr(vtok, name) is not None


@pytest.mark.parametrize("method", sorted(set(methods.names("score", "merge")) - {"b_vllm", "videochat_flash"}))
@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3),
    st.integers(20, 100),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
@example(grids=[(2, 0, 3)], percent=50, extra=1, seed=0)
def test_rows_after_the_grids_decide_nothing(method, grids, percent, extra, seed):
    """Whatever they hold, and whatever grids are empty."""
    torch.manual_seed(seed)
    layout = Layout.from_grid(grids, extra_rows=extra)
    tokens = torch.randn(layout.total, 6)
    others = torch.where(layout.extra_mask()[:, None], 9 * torch.randn_like(tokens), tokens)
    try:
        one, other = (compress(x, layout, budget=f"{percent}%", method=method) for x in (tokens, others))
    except ValueError as error:
        assert method == "optimal" and "a row for each of the" in str(error)
        return
    assert torch.equal(one.index, other.index)
    assert one.assignment is None or torch.equal(one.assignment, other.assignment)
