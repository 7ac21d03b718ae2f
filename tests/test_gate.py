"""gate_patches: exact budgets, gates, merge units, what the rows hold, and what the originals kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok import gate_patches, methods
from vtok.methods import dtd_pixel, grt
from vtok.sites import kept_before, until_next


def clip(videos=2, steps=4, high=3, wide=2, patch=4, tubelet=1, dtype=torch.uint8):
    """Noise that stands still but for one patch of each step."""
    shape = (videos, steps * tubelet, 3, high * patch, wide * patch)
    frames = torch.randint(0, 256, (*shape[:1], 1, *shape[2:]), dtype=torch.uint8).repeat(1, shape[1], 1, 1, 1)
    for t in range(1, steps):
        site = t % (high * wide)
        y, x = site // wide * patch, site % wide * patch
        frames[:, t * tubelet :, :, y : y + patch, x : x + patch] ^= 85
    return frames.to(dtype)


def rows_of(frames, patch, tubelet=1):
    """[B, T', h, w, C·tubelet·ph·pw], the order of a flattened convolution weight."""
    cut = frames.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(1, (-1, tubelet))
    return cut.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 60))
def test_a_budget_is_met_exactly_by_the_patches_that_moved_most(videos, steps, high, wide, budget):
    frames = torch.randint(0, 256, (videos, steps, 2, high * 4, wide * 4), dtype=torch.uint8)
    packed = gate_patches(frames, patch=4, budget=budget)
    sites = steps * high * wide
    kept = min(budget, sites)
    assert packed.cu_seqlens.tolist() == [v * kept for v in range(videos + 1)]
    x = rows_of(frames, 4).double()
    moved = torch.full((videos, steps, high, wide), math.inf).double()
    moved[:, 1:] = (x[:, 1:] - x[:, :-1]).square().sum(-1)
    for v in range(videos):
        order = sorted(range(sites), key=lambda s: (-moved[v].flatten()[s].item(), s))
        got = packed.index[v * kept : (v + 1) * kept] - v * sites
        assert got.tolist() == sorted(order[:kept])
    assert torch.allclose(packed.values.double(), x.flatten(0, 3)[packed.index] / 255, atol=1e-6)


def test_positions_and_carried_form():
    frames = clip()
    packed = gate_patches(frames, patch=4, threshold=0)
    assert packed.positions[:6].tolist() == [[0, y, x] for y in range(3) for x in range(2)]
    assert packed.positions[6:9].tolist() == [[1, 0, 1], [2, 1, 0], [3, 1, 1]]
    whole = rows_of(frames, 4).flatten(0, 3) / 255
    assert torch.allclose(packed.trim().unmerge(fill="hold"), whole, atol=1e-6)  # nothing that moved was lost
    assert packed.counts.tolist() == [9, 9]


@pytest.mark.parametrize("merge_size, tubelet", [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_merge_units_are_whole_and_in_the_order_of_a_qwen_tower(merge_size, tubelet):
    frames = torch.randint(0, 256, (2, 3 * tubelet, 3, 2 * merge_size * 4, 3 * merge_size * 4), dtype=torch.uint8)
    packed = gate_patches(frames, patch=4, budget=7, merge_size=merge_size, tubelet=tubelet)
    assert packed.layout.grids == [(3, 2, 3)] * 2 and packed.index.shape == (14,)
    x = rows_of(frames, 4, tubelet).float() / 255  # [B, T', h, w, P]
    x = x.unflatten(3, (-1, merge_size)).unflatten(2, (-1, merge_size)).transpose(3, 4).flatten(4)
    assert torch.allclose(packed.values, x.flatten(0, 3)[packed.index], atol=1e-6)


def test_embedding_of_the_rows_is_the_convolution():
    frames, conv = torch.randn(1, 3, 3, 8, 12), torch.nn.Conv2d(3, 5, 4, 4)
    packed = gate_patches(frames, patch=4, budget="100%", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    whole = conv((frames[0] - mean) / std).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(packed.values @ conv.weight.flatten(1).T + conv.bias, whole, atol=1e-5)


def test_residual_rows_add_up_along_time():
    frames = torch.randint(0, 256, (2, 5, 3, 8, 12), dtype=torch.uint8)
    packed = gate_patches(frames, patch=4, budget=17)
    residual = gate_patches(frames, patch=4, budget=17, residual=True)
    assert torch.equal(packed.index, residual.index)
    before = kept_before(packed.index, packed.layout)
    slot = {row: k for k, row in enumerate(packed.index.tolist())}
    assert (before >= 0).any()
    for k, row in enumerate(before.tolist()):
        want = packed.values[k] - (packed.values[slot[row]] if row >= 0 else 0)
        assert torch.allclose(residual.values[k], want, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 2), st.integers(1, 2)), max_size=3),
    st.integers(0, 2),
    st.data(),
)
def test_before_and_after_are_the_walk_along_each_site(grids, padding, data):
    layout = vtok.Layout.from_grid(grids, extra_rows=data.draw(st.integers(0, 1)))
    kept = [row for row in range(layout.total) if data.draw(st.booleans())]
    index = torch.tensor(kept + [-1] * padding, dtype=torch.int64)
    before, length = kept_before(index, layout), until_next(index, layout)
    want_before, want_length, start = {}, {}, 0
    for t, h, w in grids:
        for site in range(h * w):
            column = [start + f * h * w + site for f in range(t)]
            for f, row in enumerate(column):
                earlier = [r for r in column[:f] if r in kept]
                later = [g for g in range(f + 1, t) if column[g] in kept]
                want_before[row] = earlier[-1] if earlier else -1
                want_length[row] = (later[0] if later else t) - f
        for row in range(start + t * h * w, start + t * h * w + layout.extra_rows):
            want_before[row], want_length[row] = -1, 1
        start += t * h * w + layout.extra_rows
    assert before.tolist() == [want_before[row] for row in kept] + [-1] * padding
    assert length.tolist() == [want_length[row] for row in kept] + [0] * padding


def test_floors_refresh_and_forced_steps():
    frames = clip(videos=1, steps=6)
    packed = gate_patches(frames, patch=4, threshold=1e6, min_per_frame=2)
    assert packed.trim().frame_counts.tolist() == [6, 2, 2, 2, 2, 2]
    packed = gate_patches(frames, patch=4, threshold=1e6, refresh=3)
    assert packed.trim().frame_counts.tolist() == [6, 0, 0, 6, 0, 0]
    forced = torch.zeros(1, 6, dtype=torch.bool)
    forced[0, 4] = True
    packed = gate_patches(frames, patch=4, threshold=1e6, forced=forced)
    assert packed.trim().frame_counts.tolist() == [6, 0, 0, 0, 6, 0]
    sites = forced[:, :, None, None].expand(1, 6, 3, 2)
    packed = gate_patches(frames, patch=4, budget=18, refresh=5, forced=sites)
    assert packed.frame_counts.tolist() == [6, 0, 0, 0, 6, 6]


@pytest.mark.parametrize(
    "amount", [{"budget": 9}, {"threshold": 0.5}, {"budget": 9, "search": 1}, {"threshold": 0.5, "search": 1}], ids=str
)
@pytest.mark.parametrize(
    "change, text",
    [
        ({"refresh": -1}, "refresh of at least 0, got -1"),
        ({"reference": "kept"}, "reference 'previous' or 'last_kept', got 'kept'"),
        ({"forced": torch.zeros(1, 4).bool()}, r"forced as bool \(2, 4\) or \(2, 4, 3, 2\), got .* \(1, 4\)"),
        ({"forced": torch.zeros(2, 4, 1, 1).bool()}, r"got torch.bool \(2, 4, 1, 1\)"),
        ({"forced": torch.zeros(2, 4)}, r"got torch.float32 \(2, 4\)"),
        ({"forced": [0]}, "got list"),
    ],
)  # fmt: skip
def test_options_of_grt_are_checked_whichever_op_runs(amount, change, text):
    reference = {"reference": "previous"} if "search" in amount else {}
    with pytest.raises(ValueError, match=f"method 'grt': expected .*{text}"):
        gate_patches(clip(), patch=4, **(amount | reference | change))


@pytest.mark.parametrize("search", [0, 1])
def test_a_threshold_beyond_every_number_keeps_what_is_kept_anyhow(search):
    forced = torch.tensor([[0, 0, 0, 1, 0, 0]]).bool()
    packed = gate_patches(
        clip(videos=1, steps=6), patch=4, threshold=1e300, reference="previous", refresh=2, forced=forced, search=search
    )
    assert packed.frame_counts.tolist() == [6, 0, 6, 6, 6, 0]


def test_capacity_shows_what_it_had_no_room_for():
    packed = gate_patches(clip(), patch=4, threshold=0, capacity=11)
    assert packed.index.shape == (11,) and packed.counts.tolist() == [9, 9]
    assert packed.cu_seqlens.tolist() == [0, 9, 11]


def test_drift_is_caught_by_last_kept_alone():
    drift = (torch.arange(20.0) * 0.0485)[None, :, None, None, None].expand(1, 20, 1, 4, 4) / 4  # of the whole patch
    kept = {
        r: gate_patches(drift, patch=4, threshold=0.3, reference=r).trim().index.shape[0]
        for r in ("previous", "last_kept")
    }
    assert kept == {"previous": 1, "last_kept": 3}


def test_the_gates_agree_on_where_strict_is():
    frames = torch.zeros(1, 2, 1, 4, 4)
    frames[:, 1] = 0.25
    assert gate_patches(frames, patch=4, threshold=0.25, method="rlt").counts.tolist() == [1]
    assert gate_patches(frames, patch=4, threshold=0.25, method="dtd_pixel").counts.tolist() == [2]


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"patch": 5}, ValueError, "expected frames in whole units of 5x5 pixels, got 12x8"),
        ({"patch": 16}, ValueError, "whole units of 16x16 pixels"),
        ({"merge_size": 2}, ValueError, "whole units of 8x8"),
        ({"patch": (4, 4, 4)}, ValueError, "expected patch as one side or"),
        ({"patch": 0}, ValueError, "expected patch of at least 1"),
        ({"tubelet": 3}, ValueError, "expected frames divisible by tubelet=3, got 4"),
        ({"budget": None}, ValueError, "expected one of budget"),
        ({"threshold": 0.1}, ValueError, "expected one of budget"),
        ({"budget": None, "threshold": -1.0}, RuntimeError, "threshold"),
        ({"budget": None, "threshold": math.nan}, RuntimeError, "threshold"),
        ({"capacity": 3}, ValueError, "expected capacity with a threshold only"),
        ({"budget": 0}, ValueError, "budget"),
        ({"method": "evs"}, ValueError, "expected one of the methods .*'grt'.*got 'evs', which is for vtok.compress"),
        ({"method": "nothing"}, ValueError, "expected one of the methods"),
        ({"method": "rlt", "refresh": 2}, TypeError, "expected options among"),
        ({"metric": "l3"}, RuntimeError, "metric"),
        ({"mean": [0.5]}, RuntimeError, "mean"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(change, error, text):
    with pytest.raises(error, match=text) as caught:
        gate_patches(clip(), **({"patch": 4, "budget": 9} | change))
    assert "\n" not in str(caught.value)


def test_frames_of_another_shape():
    with pytest.raises(ValueError, match=r"expected frames of shape \[B, T, C, H, W\], got \(4, 3, 12, 8\)"):
        gate_patches(clip()[0], patch=4, budget=3)
    with pytest.raises(ValueError, match="got list"):
        gate_patches([], patch=4, budget=3)
    with pytest.raises(ValueError, match=r"'grt', which is for vtok\.gate_patches"):
        vtok.compress(torch.zeros(1, 2, 3, 4), budget=1, method="grt")


def test_nothing_in_nothing_out():
    for shape in [(0, 4, 3, 8, 8), (2, 0, 3, 8, 8)]:
        packed = gate_patches(torch.zeros(shape), patch=4, budget=5)
        assert packed.values.shape == (0, 48) and packed.cu_seqlens.tolist() == [0] * (shape[0] + 1)


def test_a_graph_of_any_size():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, n: gate_patches(x, patch=4, budget=n).values, fullgraph=True, dynamic=True, backend="eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
        for videos, steps, budget in [(2, 4, 9), (3, 5, 11), (4, 7, 20)]:
            frames = clip(videos, steps)
            assert torch.equal(compiled(frames, budget), gate_patches(frames, patch=4, budget=budget).values)


@pytest.mark.parametrize("mode", ["motion", "uniform", "center"])
def test_residualvit_in_a_graph(mode):
    """Its own budget is counted outside; the patterns, host arithmetic, make a graph for each size of frame."""
    settings = {"patch": 4, "method": "residualvit", "mode": mode}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, plan: gate_patches(x, budget=plan, **settings).values, fullgraph=True, dynamic=True, backend="eager"
    )
    for videos, steps, high, wide in [(2, 4, 3, 2), (3, 7, 3, 2), (2, 5, 4, 6)]:
        frames, grid = clip(videos, steps, high, wide), (steps, high, wide)
        own = [methods.get("residualvit").budget(grid)] * videos
        plan = vtok.Plan.of(vtok.Layout.uniform(videos, *grid), budget=own)
        assert torch.equal(compiled(frames, plan), gate_patches(frames, **settings).values)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected a budget inside a graph"):
        compiled(frames, None)


def test_gradients_reach_the_pixels():
    frames = torch.randn(1, 3, 2, 8, 8, requires_grad=True)
    packed = gate_patches(frames, patch=4, budget=7, std=[0.5, 0.25])
    packed.values.sum().backward()
    rows = rows_of(frames.grad, 4).flatten(0, 3)
    assert (rows[packed.index] != 0).all() and not rows[~packed.mask].any()


@pytest.mark.parametrize("amount", [{"budget": 7}, {"threshold": 0.3}, {"threshold": 0.3, "min_per_frame": 1}], ids=str)
@pytest.mark.parametrize("method", [{}, {"search": 1, "reference": "previous"}, {"method": "rlt"}], ids=str)
def test_frames_of_any_dtype_have_scores_of_one(tmp_path, amount, method):
    """float64 too, whose distances are float64; what is saved is read again."""
    frames = clip(videos=1, dtype=torch.float32) / 16
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        packed = gate_patches(frames.to(dtype), patch=4, **amount, **method)
        assert packed.scores.dtype == torch.float32 and packed.values.dtype == dtype
        packed.save(tmp_path / "packed.safetensors", overwrite=True)
        assert torch.equal(vtok.Packed.load(tmp_path / "packed.safetensors").index, packed.index)
    plain = gate_patches(frames.float(), patch=4, **amount, **method)
    assert torch.equal(gate_patches(frames.double(), patch=4, **amount, **method).index, plain.index)


def test_the_decision_is_no_part_of_the_gradient():
    frames = torch.randn(1, 3, 2, 8, 8, requires_grad=True)
    for amount in ({"budget": 7}, {"threshold": 0.1}):
        packed = gate_patches(frames, patch=4, **amount)
        assert packed.values.requires_grad and not packed.scores.requires_grad


def test_relative_scores_of_the_release():
    score = torch.tensor([[[[math.inf, math.inf]], [[2.0, 4.0]], [[0.0, 0.0]]]])
    assert grt.relative(score).tolist() == [[[[1.0, 1.0]], [[0.5, 1.0]], [[0.0, 0.0]]]]


def test_counts_of_the_releases():
    assert [grt.packed_rows(n, r) for n, r in [(196, 0.5), (20, 0.5), (10, 0.5)]] == [98, 16, 10]
    assert dtd_pixel.relative_rows(6, 0.6) == 3


def test_methods_by_kind():
    assert {"grt", "rlt", "dtd_pixel"} <= set(methods.names("gate"))
    assert not set(methods.names("gate")) & set(methods.names("score"))
