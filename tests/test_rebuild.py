"""A search in gate_patches: vectors travel with the rows, residuals are compensated, rebuild_patches follows them."""

from __future__ import annotations

import pytest
import torch

import vtok
from vtok import gate_patches, rebuild_patches


def pan(steps=5, videos=2, tubelet=1, by=(0, 2)):
    """A picture that moves at every step; what comes in at the edges is new."""
    (dy, dx), far = by, 4 * steps
    picture = torch.randint(0, 256, (videos, 3, 32 + far, 48 + far), dtype=torch.uint8)
    at = [(far // 2 + t * dy, far // 2 + t * dx) for t in range(steps) for _ in range(tubelet)]
    return torch.stack([picture[:, :, y : y + 32, x : x + 48] for y, x in at], 1)


def test_what_only_moved_is_dropped_and_comes_back():
    frames = pan()
    packed = gate_patches(frames, patch=8, threshold=0, reference="previous", search=3).trim()
    assert packed.frame_counts.tolist() == [24, 4, 4, 4, 4] * 2  # the column that came in
    assert gate_patches(frames, patch=8, threshold=0, reference="previous").trim().index.shape == (240,)
    inside = packed.vectors.view(2, 5, 4, 6, 2)[:, 1:, :, :5]
    assert (inside == torch.tensor([0, 2])).all()
    assert torch.allclose(rebuild_patches(packed, patch=8), frames / 255, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"tubelet": 2, "merge_size": 2, "order": "thwc"}, {"tubelet": 2}])
@pytest.mark.parametrize("residual", [False, True])
def test_every_row_kept_rebuilds_the_frames(settings, residual):
    frames = pan(steps=3, tubelet=settings.get("tubelet", 1), by=(1, -1))
    writing = {"patch": 4, "residual": residual, **settings}
    packed = gate_patches(frames, budget="100%", search=2, mean=[0.5] * 3, std=[0.25] * 3, **writing)
    assert packed.vectors.any()
    assert torch.allclose(rebuild_patches(packed, **writing), frames / 255 * 4 - 2, atol=1e-5)


def test_compensated_residuals_are_what_is_left():
    """Small where the plain ones are large; equal to the distance that the gate scored."""
    frames = pan(by=(-1, 1))
    packed = gate_patches(frames, patch=8, budget="100%", search=2, residual=True, std=[1 / 255] * 3, metric="mse")
    left = packed.values.square().mean(1)
    later = packed.positions[:, 0] > 0
    assert torch.allclose(left[later], packed.scores[packed.index][later])
    plain = gate_patches(frames, patch=8, budget="100%", residual=True, std=[1 / 255] * 3).values.square().mean(1)
    assert left[later].sum() < 0.7 * plain[later].sum()


def test_without_vectors_a_site_holds():
    frames = pan()
    packed = gate_patches(frames, patch=8, budget=60)
    assert packed.vectors is None
    held = rebuild_patches(packed, patch=8)
    rows = vtok.ops.patchify(held, torch.arange(packed.layout.total), [8, 8])
    assert torch.equal(rows, packed.unmerge(fill="hold"))
    residual = gate_patches(frames, patch=8, budget=60, residual=True)
    assert torch.allclose(rebuild_patches(residual, patch=8, residual=True), held, atol=1e-6)


@pytest.mark.parametrize("settings", [{"reference": "previous", "search": 3}, {}], ids=["vectors", "held"])
def test_a_chunk_goes_on_from_the_one_before(settings):
    frames = pan(tubelet=2)
    frames[..., :16, :] = frames[:, :1, :, :16]
    settings = {"patch": 8, "tubelet": 2, "threshold": 0, **settings}
    stream, before = vtok.Stream("grt", **settings), None
    for chunk in frames.split(4, 1):
        rows = stream.push(chunk).trim()
        rebuilt = rebuild_patches(rows, patch=8, tubelet=2, before=before)
        assert torch.allclose(rebuilt, chunk / 255, atol=1e-6)
        assert before is None or not torch.allclose(rebuild_patches(rows, patch=8, tubelet=2), rebuilt)
        before = rebuilt[:, -2:]


def test_a_step_before_of_another_size_is_refused():
    packed = gate_patches(pan(), patch=8, budget=30)
    with pytest.raises(ValueError, match=r"expected before of shape \(2, 1, 3, 32, 48\), got \(2, 3, 32, 48\)"):
        rebuild_patches(packed, patch=8, before=torch.zeros(2, 3, 32, 48))


def test_vectors_travel_with_the_rows():
    frames = pan()
    packed = gate_patches(frames, patch=8, budget=60, search=3)
    assert packed.vectors.shape == (packed.layout.total, 2)
    for v, alone in enumerate(packed.split()):
        assert torch.equal(alone.vectors, packed.vectors[v * 120 : v * 120 + 120])
        want = gate_patches(frames[v : v + 1], patch=8, budget=60, search=3)
        assert torch.equal(alone.index, want.index) and torch.equal(alone.vectors, want.vectors)
    assert packed.take(packed.vectors.float()).shape == (120, 2)
    assert torch.equal(packed.trim().vectors, packed.vectors)
    layout = vtok.Layout.from_grid([(1, 1, 60)] * 2)
    later = vtok.compress(packed.values, layout, budget=20, method="uniform")
    assert torch.equal(packed.then(later).vectors, packed.vectors)


def test_refreshed_and_forced_steps():
    frames = pan(videos=1)
    counts = gate_patches(frames, patch=8, threshold=0, reference="previous", search=3, refresh=2).trim().frame_counts
    assert counts.tolist() == [24, 4, 24, 4, 24]
    forced = torch.tensor([[False, True, False, False, True]])
    counts = gate_patches(frames, patch=8, budget=72, search=3, forced=forced).frame_counts
    assert counts.tolist() == [24, 24, 0, 0, 24]


def test_the_bias_of_a_search():
    frames = pan(videos=1, by=(0, 1))
    free, held = (gate_patches(frames, patch=8, budget=40, search=1, bias=b, metric="l1") for b in (0.0, 1e6))
    assert free.vectors.any() and not held.vectors.any()
    assert torch.equal(held.index, gate_patches(frames, patch=8, budget=40, metric="l1").index)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"reference": "last_kept"}, ValueError, 'expected reference "previous" with a search under a threshold, got'),
        ({"threshold": -1.0}, ValueError, "expected threshold finite and >= 0, got -1"),
        ({"search": -1}, RuntimeError, "expected radius >= 0, got -1"),
        ({"metric": "ssim"}, RuntimeError, 'expected metric of "l1", "mse" or "l2", got "ssim"'),
        ({"bias": -1.0}, RuntimeError, "expected bias finite and >= 0, got -1"),
        ({"method": "rlt"}, TypeError, "expected options among"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(change, error, text):
    with pytest.raises(error, match=text) as caught:
        gate_patches(pan(), **({"patch": 8, "threshold": 1.0, "reference": "previous", "search": 1} | change))
    assert "\n" not in str(caught.value)


def test_rows_of_another_size_are_refused():
    packed = gate_patches(pan(), patch=8, budget=30)
    with pytest.raises(ValueError, match="expected rows of 25 values a channel in order cthw or thwc, got 192 in cthw"):
        rebuild_patches(packed, patch=5)


def test_nothing_in_nothing_out():
    for shape in [(0, 4, 3, 8, 8), (2, 0, 3, 8, 8)]:
        packed = gate_patches(torch.zeros(shape), patch=4, budget=5, search=1)
        assert packed.vectors.shape == (0, 2) and rebuild_patches(packed, patch=4).shape == shape


def test_a_graph_of_any_size():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def run(x, n):
        packed = gate_patches(x, patch=8, budget=n, search=1, residual=True)
        return packed.values, packed.vectors

    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
        for videos, steps, budget in [(2, 4, 9), (3, 5, 11)]:
            frames = pan(steps, videos)
            want = gate_patches(frames, patch=8, budget=budget, search=1, residual=True)
            values, vectors = run(frames, budget)
            assert torch.equal(values, want.values) and torch.equal(vectors, want.vectors)


def test_gradients_reach_both_blocks():
    frames = pan(videos=1).float().requires_grad_()
    packed = gate_patches(frames, patch=8, budget="100%", search=2, residual=True)
    packed.values[packed.positions[:, 0] > 0].sum().backward()
    assert frames.grad[:, 0].sum() == -3 * 32 * 48 and frames.grad[:, -1].sum() == 3 * 32 * 48
