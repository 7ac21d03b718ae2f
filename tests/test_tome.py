"""Methods that merge what is most alike: exact budgets, rounds, and what the originals returned (golden/tokens)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok import Layout, Packed, compress
from vtok.decide import Plan

GOLDEN = Path(__file__).with_name("golden")
CASES = {case["name"]: case for case in json.loads((GOLDEN / "tokens" / "tome.json").read_text())["cases"]}
GRIDS = [(4, 2, 3), (0, 2, 2), (1, 3, 3), (6, 1, 5)]


def arrays(name: str):
    golden = np.load(GOLDEN / CASES[name]["file"], allow_pickle=False)
    return {key: torch.from_numpy(golden[key]) for key in golden.files}, CASES[name]["params"]


def named(op: str) -> list[str]:
    return [name for name, case in CASES.items() if case["op"] == op]


def same_rows(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> bool:
    """Whether two lists hold the same rows, in any order."""
    nearest = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    return a.shape == b.shape and len(set(nearest.tolist())) == a.shape[0] and torch.allclose(a, b[nearest], atol=atol)


@pytest.mark.parametrize("name", named("tome"))
def test_as_the_original(name):
    golden, params = arrays(name)
    videos, rows, _ = golden["in_x"].shape
    protected, left = int(params["class_token"]), golden["out_x1"].shape[1]
    layout = Layout.from_grid([(1, 1, rows)] * videos)
    packed = compress(
        golden["in_x"].flatten(0, 1), layout, budget=left, method="tome", protected=protected,
        metric=golden["in_metric"].flatten(0, 1),
    )  # fmt: skip
    scattered = compress(
        golden["in_x"].flatten(0, 1), layout, budget=left, method="tome", protected=protected, order="release",
        metric=golden["in_metric"].flatten(0, 1),
    )  # fmt: skip
    assert torch.allclose(scattered.values[scattered.order], golden["out_x1"].flatten(0, 1), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in ((scattered.values, packed.values), (scattered.index, packed.index)))
    joined = golden["out_assign1"] + torch.arange(videos)[:, None] * left  # the original's row of each token
    for mine, theirs in ((packed.unmerge(), golden["out_x1"]), (packed.weight[packed.assignment], golden["out_size1"])):
        assert torch.allclose(mine, theirs.flatten(0, 1)[joined.flatten()].view_as(mine), atol=1e-5)
    assert torch.allclose(packed.reduce(golden["in_x"].flatten(0, 1)), packed.values)
    order = torch.empty(videos * left, dtype=torch.int64).scatter_(0, joined.flatten(), packed.assignment)
    assert sorted(order.tolist()) == list(range(videos * left)), "a group of the original is none here"
    # Its second round: its own rows, in its own order, with the sizes they have.
    x, kept = golden["out_x1"].flatten(0, 1), golden["out_x2"].shape[1]
    second = compress(
        x, Layout.from_grid([(1, 1, left)] * videos), budget=kept, method="tome", protected=protected,
        weights=golden["out_size1"].flatten(),
    )  # fmt: skip
    for v in range(videos):
        part = slice(v * kept, (v + 1) * kept)
        got = torch.cat([second.values[part], second.weight[part, None]], 1)
        assert same_rows(got, torch.cat([golden["out_x2"][v], golden["out_size2"][v]], 1))


@pytest.mark.parametrize("name", named("videochat_flash_merge"))
def test_videochat_flash_as_the_original(name):
    golden, params = arrays(name)
    clips, rows, channels = golden["in_x"].shape
    tokens = golden["in_x"].reshape(1, 4 * clips, rows // 4, channels)  # one video of all clips
    packed = compress(
        tokens, budget=params["target"] * clips, method="videochat_flash", head_dim=params["head_dim"]
    )  # fmt: skip
    got = packed.values.view(clips, params["target"], channels)
    assert packed.weight.view(clips, -1).sum(1).tolist() == [rows] * clips
    assert all(same_rows(a, b) for a, b in zip(got, golden["out_merged"], strict=True))
    scattered = compress(
        tokens, budget=params["target"] * clips, method="videochat_flash", head_dim=params["head_dim"], order="release"
    )  # fmt: skip
    in_order = scattered.values[scattered.order].view_as(got)
    assert torch.allclose(in_order, golden["out_merged"], atol=1e-5)


def test_the_order_of_the_release_goes_with_the_rows(tmp_path):
    tokens = torch.randn(2, 4, 6, 8)
    packed = compress(tokens, budget=7, method="tome", order="release")
    assert packed.order.sort().values.tolist() == list(range(14)) and packed.index.diff()[:6].gt(0).all()
    for alone, video in zip(
        (compress(t[None], budget=7, method="tome", order="release") for t in tokens), packed.split(), strict=True
    ):
        assert torch.equal(alone.order, video.order)
    packed.save(tmp_path / "p.safetensors")
    assert torch.equal(Packed.load(tmp_path / "p.safetensors").order, packed.order)
    with pytest.raises(ValueError, match="expected order 'place' or 'release', got 'random'"):
        compress(tokens, budget=7, method="tome", order="random")


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("options", [{}, {"per": "frame"}, {"protected": 1}], ids=str)
def test_the_order_of_a_video_does_not_depend_on_the_others(options, extra):
    grids, budget = [(5, 2, 4), (4, 2, 3), (2, 1, 5)], [7, 14, 10]  # three rounds, one, and none
    layout = Layout.from_grid(grids, extra_rows=extra)
    tokens = torch.randn(layout.total, 8)
    parts = compress(tokens, layout, budget=budget, method="tome", order="release", **options).split()
    for x, grid, rows, part in zip(tokens.split([n + extra for n in (40, 24, 10)]), grids, budget, parts, strict=True):
        alone = compress(x, [grid], extra_rows=extra, budget=rows, method="tome", order="release", **options)
        assert torch.equal(part.order, alone.order)
    assert parts[2].order.tolist() == list(range(10 + extra))


def test_nothing_is_left_in_the_order_of_the_release():
    packed = compress(torch.randn(6, 4), [(2, 1, 3)], budget=[0], method="tome", order="release")
    assert packed.assignment.tolist() == [-1] * 6 and packed.order.shape == (0,)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 4)), max_size=3),
    st.integers(0, 2),
    st.sampled_from(["tome", "frame", "clips", "protected"]),
    st.data(),
)
def test_any_budget_is_met(grids, extra, how, data):
    layout, protected = Layout.from_grid(grids, extra_rows=extra), how == "protected"
    budget = [data.draw(st.integers(1 + protected if t else 0, max(t * h * w, 2))) for t, h, w in grids]
    tokens = torch.randint(-2, 3, (layout.total, 6)).float()
    method, options = {
        "tome": ("tome", {}), "frame": ("tome", {"per": "frame"}), "clips": ("videochat_flash", {"head_dim": 3}),
        "protected": ("tome", {"protected": 1}),
    }[how]  # fmt: skip
    packed = compress(tokens, layout, budget=budget, method=method, **options)
    sizes = [t * h * w for t, h, w in grids]
    assert packed.cu_seqlens.diff().tolist() == [min(k, n) + extra for k, n in zip(budget, sizes, strict=True)]
    rows = torch.arange(packed.index.shape[0])
    assert torch.equal(packed.assignment[packed.index], rows) and (packed.index.diff() > 0).all()
    assert torch.equal(packed.weight, torch.bincount(packed.assignment[packed.assignment >= 0], minlength=len(rows)))
    video = layout.video_of(torch.arange(layout.total)) if grids else rows
    kept = packed.assignment >= 0
    assert kept.all() or how in ("frame", "clips")  # a frame without any of the budget is dropped
    assert torch.equal(video[packed.index[packed.assignment[kept]]], video[kept])
    for k in rows.tolist():
        assert torch.allclose(packed.values[k], tokens[packed.assignment == k].double().mean(0).float(), atol=1e-5)
    start = 0
    for n in sizes:  # what must stay alone
        alone = [*range(start + n, start + n + extra), *([start] if protected and n else [])]
        assert (packed.weight[packed.assignment[alone]] == 1).all() and (packed.assignment[alone] >= 0).all()
        start += n + extra


def test_rounds_halve():
    """Eight equal tokens go together, and one other stays alone, in as many rounds as it takes."""
    tokens = torch.ones(1, 1, 9, 3)
    tokens[0, 0, 3] = -1
    packed = compress(tokens, budget=2, method="tome")
    assert sorted(packed.weight.tolist()) == [1.0, 8.0]
    assert same_rows(packed.values, torch.tensor([[-1.0] * 3, [1.0] * 3]))


@pytest.mark.parametrize("how", [{"budget": [[3, 1, 2], [0, 4]]}, {"budget": [6, 4], "per": "frame"}], ids=str)
def test_frames_keep_their_share(how):
    layout = Layout.from_grid([(3, 2, 3), (2, 2, 2)])
    packed = compress(torch.randn(layout.total, 5), layout, method="tome", **how)
    want = [3, 1, 2, 0, 4] if "per" not in how else [2, 2, 2, 2, 2]
    assert packed.frame_counts.tolist() == want
    frame = torch.tensor([0] * 6 + [1] * 6 + [2] * 6 + [3] * 4 + [4] * 4)
    kept = packed.assignment >= 0
    assert torch.equal(frame[packed.index[packed.assignment[kept]]], frame[kept])
    assert torch.equal(~kept, torch.tensor([0, 0, 0, want[3] == 0, 0], dtype=torch.bool)[frame])


def test_rounds_by_hand_are_rounds_within():
    """A budget in two calls, the second with the weights of the first, is that budget in one."""
    tokens = torch.randn(1, 1, 32, 4)
    first = compress(tokens, budget=16, method="tome")
    second = compress(first.values, Layout.from_grid([(1, 1, 16)]), budget=8, method="tome", weights=first.weight)
    third = compress(second.values, Layout.from_grid([(1, 1, 8)]), budget=3, method="tome", weights=second.weight)
    once, one_less = compress(tokens, budget=3, method="tome"), compress(
        first.values, Layout.from_grid([(1, 1, 16)]), budget=3, method="tome", weights=first.weight
    )  # fmt: skip
    for rounds in (first.then(second.then(third)), first.then(one_less)):
        assert torch.equal(rounds.assignment, once.assignment) and torch.equal(rounds.index, once.index)
        assert torch.allclose(rounds.values, once.values, atol=1e-5) and torch.equal(rounds.weight, once.weight)


def test_nan_joins_last():
    tokens = torch.randn(1, 1, 8, 4)
    tokens[0, 0, 2] = float("nan")
    packed = compress(tokens, budget=5, method="tome")
    assert packed.weight[packed.assignment[2]] == 1


def test_gradients_share_the_mean():
    tokens = torch.ones(1, 1, 4, 3, requires_grad=True)
    compress(tokens, budget=1, method="tome").values.sum().backward()
    assert torch.equal(tokens.grad, torch.full((1, 1, 4, 3), 0.25))


@pytest.mark.parametrize(
    "method, options, text",
    [
        ("tome", {"threshold": 0.5}, "expected a budget, got a threshold"),
        ("tome", {"budget": 4, "per": "clip"}, "expected per 'video' or 'frame', got 'clip'"),
        ("tome", {"budget": 4, "metric": torch.ones(3, 2)}, r"expected metric \[24, C\], got \(3, 2\)"),
        ("tome", {"budget": 4, "protected": 4}, "expected a budget of at least 5 rows a segment, got 4"),
        ("tome", {"budget": 9, "min_per_frame": 2}, "expected min_per_frame=0, got rows that each frame keeps"),
        ("videochat_flash", {"budget": 4}, "expected tokens of whole heads in clips, got clip 4 and head_dim 64"),
    ],
)
def test_errors(method, options, text):
    with pytest.raises(ValueError, match=text):
        compress(torch.randn(1, 3, 8, 8), method=method, **options)


@pytest.mark.parametrize(
    "method, options", [("tome", {}), ("tome", {"per": "frame"}), ("videochat_flash", {"head_dim": 4})]
)
def test_one_graph(method, options):
    torch._dynamo.reset()
    call = lambda x: compress(x, budget=6, method=method, **options)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for videos in (2, 3, 6):
            tokens = torch.randn(videos, 5, 4, 8)
            packed, want = compiled(tokens), call(tokens)
            assert torch.equal(packed.values, want.values) and torch.equal(packed.assignment, want.assignment)


def test_one_graph_for_other_sizes_of_as_many_rounds():
    torch._dynamo.reset()
    call = lambda x: compress(x, budget=0.6, method="tome")  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for shape in ((2, 8, 12, 24), (3, 9, 14, 24), (4, 6, 21, 24)):
            tokens = torch.randn(shape)
            packed, want = compiled(tokens), call(tokens)
            assert torch.equal(packed.index, want.index) and torch.equal(packed.values, want.values)


def test_one_graph_with_a_plan():
    torch._dynamo.reset()
    layout = Layout.from_grid(GRIDS)
    plan, tokens = Plan.of(layout, budget=[5, 0, 9, 11]), torch.randn(layout.total, 7)
    call = lambda x, layout: compress(x, layout, budget=plan, method="tome")  # noqa: E731
    packed = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")(tokens, layout)
    assert torch.equal(packed.values, call(tokens, layout).values)


@pytest.mark.parametrize("split", [3, 5])
def test_every_kth_token_receives(split):
    """The release's kth_bipartite on whole groups: each of the others joins the most alike of every k-th token."""
    torch.manual_seed(split)
    x = torch.randn(4 * split, 8)
    packed = compress(x[None, None], budget=4, method="tome", split=split)
    receivers = torch.arange(split - 1, 4 * split, split)
    unit = torch.nn.functional.normalize(x, dim=-1)
    joins = (unit @ unit[receivers].T).argmax(1)
    assert packed.index.tolist() == receivers.tolist()
    assert (
        packed.assignment.tolist()
        == joins.where(torch.arange(4 * split) % split != split - 1, torch.arange(4 * split) // split).tolist()
    )


@pytest.mark.parametrize("protected", [0, 1, 4])
@pytest.mark.parametrize("split", [2, 3, 7])
def test_split_budgets_are_exact(split, protected):
    tokens = torch.randn(2, 3, 7, 5)
    for budget in range(protected + 1, 22):
        try:
            packed = compress(tokens, budget=budget, method="tome", split=split, protected=protected)
        except ValueError as error:
            assert "expected a budget of at least" in str(error)
            assert budget < protected + split
            continue
        assert packed.cu_seqlens.tolist() == [0, min(budget, 21), 2 * min(budget, 21)]
        assert packed.weight.sum() == 42
