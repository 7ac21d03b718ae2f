"""Windows of frames against their rules written as loops: ties, NaN, short and ragged videos."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from vtok import Layout
from vtok.sites import steps_since
from vtok.windows import cluster_windows, contiguous, frame_means, scene_windows, static_windows

FRAMES = [7, 0, 1, 12, 2, 5]


def layout_of(frames=FRAMES, extra=0):
    return Layout.from_grid([(t, 1, 1 + v % 3) for v, t in enumerate(frames)], extra_rows=extra)


def each_video(x, frames=FRAMES):
    return x.split(frames)


def told(windows):
    """The first frames [F] of lists of windows, video by video, each a list of lengths."""
    first, start = [], 0
    for lengths in windows:
        for length in lengths:
            first += [start] * length
            start += length
    return first


def lengths_of(cuts, frames):
    bounds = [0, *sorted(cuts), frames] if frames else []
    return [b - a for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_frame_means(dtype, extra):
    layout = layout_of(extra=extra)
    tokens, want, start = torch.randn(layout.total, 5).to(dtype), [], 0
    for t, h, w in layout.grids:
        want += list(tokens[start : start + t * h * w].view(t, h * w, 5).double().mean(1))
        start += t * h * w + extra
    got = frame_means(tokens, layout)
    assert got.dtype == dtype and torch.allclose(
        got.double(), torch.stack(want), atol=1e-2 if dtype.itemsize < 4 else 1e-6
    )


@pytest.mark.parametrize("segments", [1, 2, 4, 30])
@pytest.mark.parametrize("similarity", [0.5, -1.1, 0.0])
def test_scene_windows(similarity, segments):
    features = torch.randint(-1, 2, (sum(FRAMES), 4)).float()
    features[3], features[20] = 0, math.nan
    want = []
    for x in each_video(features):
        alike = [float(x[t - 1] @ x[t] / (x[t - 1].norm() * x[t].norm()).clamp(min=1e-8)) for t in range(1, len(x))]
        rank = sorted(
            range(len(alike)), key=lambda i: (math.isnan(alike[i]), alike[i] if alike[i] == alike[i] else 0, i)
        )
        cuts = set(rank[: segments - 1]) | {i for i, a in enumerate(alike) if round(a, 5) < similarity}
        want.append(lengths_of({i + 1 for i in cuts}, len(x)))
        below = [i for i in rank if alike[i] < similarity]  # FlashVID's way
        more = [i for i in rank if i not in below][: max(0, segments - 1 - len(below))]
        assert {*below, *more} == cuts
    assert scene_windows(features, layout_of(), segments=segments, similarity=similarity).tolist() == told(want)


def joined_runs(label):
    """Lengths of the windows that one video's clusters make."""
    runs, at = [], 0
    while at < len(label):
        end = at
        while end < len(label) and label[end] == label[at]:
            end += 1
        runs.append((at, end))
        at = end
    longest = {c: max(b - a for a, b in runs if label[a] == c) for c in set(label)}
    kept = [(a, b) for a, b in runs if b - a == longest[label[a]] > 1]
    name = list(label) if kept else [0] * len(label)
    for t in range(len(label)) if kept else ():
        before = [r for r in kept if r[0] <= t][-1:] or [(0, 0)]
        after = [r for r in kept if r[1] > t][:1] or [(0, 0)]
        (a, b), (c, d) = before[0], after[0]
        name[t] = label[a] if b - a >= d - c else label[c]
    return lengths_of([t for t in range(1, len(name)) if name[t] != name[t - 1]], len(name))


@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
def test_contiguous(clusters):
    for _ in range(20):
        frames = [random.randint(0, 14) for _ in range(4)]
        labels = [torch.randint(0, clusters, (t,)).sort().values if random.random() < 0.3 else
                  torch.randint(0, clusters, (t,)).repeat_interleave(2)[:t] for t in frames]  # fmt: skip
        first = [sum(frames[:v]) for v in range(4)]
        label = torch.cat([x.clamp(max=max(t - 1, 0)) + a for x, t, a in zip(labels, frames, first, strict=True)])
        want = [joined_runs(part.tolist()) for part in label.split(frames)]
        assert contiguous(label, layout_of(frames)).tolist() == told(want)


def test_cluster_windows_cut_at_a_scene():
    scenes = torch.randn(3, 16)[[0] * 5 + [1] * 4 + [2] * 3] + torch.randn(12, 16) / 100
    one = torch.randn(1, 16)
    features = torch.cat([scenes, one, scenes[:0], scenes.flip(0)])
    layout = layout_of([12, 1, 0, 12])
    assert cluster_windows(features, layout).tolist() == told([[5, 4, 3], [1], [], [3, 4, 5]])
    assert cluster_windows(torch.ones(9, 4), layout_of([9])).tolist() == [0] * 9
    features[3] = math.nan
    assert cluster_windows(features, layout).tolist()[13:] == told([[5, 4, 3], [1], [], [3, 4, 5]])[13:]


def best_split(still, most):
    """Lengths of HoliTom's windows of one video from the steps [T][n] that its sites have been the same."""
    best, last = [0], []
    for e in range(len(still)):
        total, length = best[e], 1
        for s in range(e - 1, max(e - most, -1), -1):
            gain = best[s] + (e - s) * sum(steps >= e - s for steps in still[e])
            if gain > total:
                total, length = gain, e - s + 1
        best.append(total)
        last.append(length)
    windows, end = [], len(still)
    while end:
        windows.insert(0, last[end - 1])
        end -= last[end - 1]
    return windows, best[-1]


def saved(windows, still):
    end, sum_ = 0, 0
    for length in windows:
        end += length
        sum_ += (length - 1) * sum(steps >= length - 1 for steps in still[end - 1])
    return sum_


def splits(frames):
    return [[]] if not frames else [[a, *rest] for a in range(1, frames + 1) for rest in splits(frames - a)]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 1024])
@pytest.mark.parametrize("chance", [0.2, 0.6, 0.9, 1.0, 0.0])
def test_static_windows(chance, most, extra):
    grids = [(7, 2, 3), (0, 2, 2), (1, 3, 2), (14, 1, 5), (2, 1, 1)]
    layout, marked, start, want = Layout.from_grid(grids, extra_rows=extra), [], 0, []
    for t, h, w in grids:
        changed = torch.rand(t, h * w) >= chance
        changed[:1] = True
        marked += [changed.flatten(), torch.ones(extra, dtype=torch.bool)]
    still = steps_since(torch.cat(marked), layout)
    for t, h, w in grids:
        steps = still[start : start + t * h * w].view(t, h * w).tolist()
        windows, total = best_split(steps, most)
        want.append(windows)
        assert saved(windows, steps) == total
        if t <= 7 and most > t:
            assert total == max(saved(split, steps) for split in splits(t))
        start += t * h * w + extra
    assert static_windows(still, layout, most=most).tolist() == told(want)


def test_steps_since():
    layout = Layout.from_grid([(4, 1, 2), (3, 1, 1)], extra_rows=1)
    marked = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1]).bool()
    assert steps_since(marked, layout).tolist() == [0, 0, 1, 0, 2, 1, 0, 2, 0, 0, 1, 2, 0]


def test_nothing_at_all():
    for layout in (layout_of([]), layout_of([0, 0])):
        none = torch.zeros(0, 3)
        assert frame_means(none, layout).shape == (0, 3)
        for windows in (scene_windows(none, layout), cluster_windows(none, layout)):
            assert windows.shape == (0,) and windows.dtype == torch.int64
        assert static_windows(torch.zeros(0, dtype=torch.int64), layout).shape == (0,)


@pytest.mark.parametrize("rule", [scene_windows, cluster_windows, static_windows])
def test_one_graph_for_all_sizes(rule):
    torch._dynamo.reset()
    call = lambda x, layout: rule(x, layout)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for frames in ([3, 2, 5], [9, 4, 6, 7], [2, 30]):
            layout = layout_of(frames, extra=1)
            x = torch.randn(layout.frames, 6)
            if rule is static_windows:
                x = steps_since(torch.rand(layout.total) < 0.3, layout)
            assert torch.equal(compiled(x, layout), call(x, layout))
