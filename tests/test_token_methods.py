"""The token methods against their rules written as loops: budgets, ties, NaN, short and ragged videos."""

from __future__ import annotations

import math

import pytest
import torch

import vtok
from vtok import Compressor, Layout, compress
from vtok.methods import dtd

GRIDS = [(7, 2, 3), (0, 2, 2), (1, 3, 2), (6, 1, 5), (3, 2, 2)]


def clip(grids, extra=0, channels=9):
    """Tokens of few values, so that cosines tie, some of them still, one NaN and one zero."""
    rows = []
    for t, h, w in grids:
        x = torch.randint(-1, 2, (t, h * w, channels)).float()
        for f in range(1, t):
            x[f] = torch.where(torch.rand(h * w, 1) < 0.4, x[f - 1], x[f])
        if t > 2:
            x[1, 0], x[2, -1, 0] = 0, math.nan
        rows += [x.flatten(0, 1), torch.randn(extra, channels)]
    return torch.cat(rows)


def videos(tokens, grids, extra=0):
    """(first row, grid, tokens [T, n, D]) of each video."""
    start = 0
    for t, h, w in grids:
        yield start, (t, h, w), tokens[start : start + t * h * w].view(t, h * w, tokens.shape[1])
        start += t * h * w + extra


def cosine(a, b):
    """As the ops say it: 0 for a zero row, NaN for a NaN."""
    pair = Layout.uniform(1, 2, 1, 1)
    both = torch.stack([a, b])
    return vtok.ops.temporal_similarity(both, pair.cu_seqlens, pair.tokens_per_frame)[1]


def first_k(scores, k):
    """Indices of the k largest: ties to the lower index, NaN last."""
    last = [math.isnan(score) for score in scores]
    return sorted(sorted(range(len(scores)), key=lambda i: (last[i], 0 if last[i] else -scores[i], i))[:k])


def one_graph(**settings):
    """The method as one graph over growing sizes, without a recompile."""
    torch._dynamo.reset()
    call = lambda x, g: compress(x, g, **settings)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for grids in ([(3, 2, 4), (2, 2, 2)], [(5, 4, 4), (6, 2, 6), (3, 2, 2)]):
            layout = Layout.from_grid(grids, extra_rows=1)
            tokens = torch.randn(layout.total, 20)
            packed, want = compiled(tokens, layout), call(tokens, layout)
            assert torch.equal(packed.index, want.index) and torch.equal(packed.values, want.values)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("threshold", [0.5, 0.0, 1.0, -1.1])
def test_dtd(extra, threshold):
    tokens, kept = clip(GRIDS, extra), []
    for start, (t, h, w), x in videos(tokens, GRIDS, extra):
        alike = [[f > 0 and cosine(x[f - 1, i], x[f, i]) > threshold for i in range(h * w)] for f in range(t)]
        kept += [start + f * h * w + i for f in range(t) for i in range(h * w) if not alike[f][i]]
        kept += [start + t * h * w + i for i in range(extra)]
    packed = compress(tokens, GRIDS, extra_rows=extra, method="dtd", threshold=threshold).trim()
    assert packed.index.tolist() == kept and not packed.is_merged
    assert torch.equal(packed.values.nan_to_num(9), tokens[packed.index].nan_to_num(9))
    assert packed.weight.sum() == tokens.shape[0]


def test_dtd_relative():
    budget = [[h * w] * min(t, 1) + [dtd.relative_rows(h * w, 0.4)] * (t - 1) for t, h, w in GRIDS]
    packed = compress(clip(GRIDS, 1), GRIDS, extra_rows=1, method="dtd", budget=budget)
    assert packed.frame_counts.tolist() == [k for video in budget for k in video]
    assert dtd.relative_rows(196, 0.4) == 118 and dtd.relative_rows(7, 0.0) == 7
    one_graph(method="dtd", threshold=0.1), one_graph(method="dtd", budget="40%")


def dycoke_rows(t, n, drop=0.7):
    keep = {0.7: {6: 1, 5: 1, 4: 1, 196: 58, 10: 3}, 0.0: {n: n}, 1.0: {n: 0}, 0.5: {n: n // 2}}[drop][n]
    return [n if f % 4 == 0 or (t % 2 and f == t - 1) else keep for f in range(t)]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("drop", [0.7, 0.5, 1.0, 0.0])
def test_dycoke(extra, drop):
    tokens, kept = clip(GRIDS, extra), []
    for start, (t, h, w), x in videos(tokens, GRIDS, extra):
        for f, k in enumerate(dycoke_rows(t, h * w, drop)):
            with_frame = f - 2 if f % 4 == 2 else f - 1
            score = [math.inf if f % 4 == 0 else float(1 - cosine(x[with_frame, i], x[f, i])) for i in range(h * w)]
            kept += [start + f * h * w + i for i in first_k(score, k)]
        kept += [start + t * h * w + i for i in range(extra)]
    packed = compress(tokens, GRIDS, extra_rows=extra, method="dycoke", drop=drop)
    assert packed.index.tolist() == kept
    rows = vtok.plan(GRIDS, method="dycoke", drop=drop)
    assert rows == [sum(dycoke_rows(t, h * w, drop)) for t, h, w in GRIDS]
    assert packed.cu_seqlens.diff().tolist() == [k + extra for k in rows]


def test_dycoke_counts_of_the_release():
    frames, rows = (5, 8, 9, 16, 32), [370, 878, 740, 1618, 3098]
    assert [vtok.plan([(t, 14, 14)], method="dycoke", compat="dycoke")[0] for t in frames] == rows
    assert vtok.plan([(8, 1, 10)], method="dycoke", drop=0.9) == [26]  # a tenth of 10 is 1,
    assert vtok.plan([(8, 1, 10)], method="dycoke", drop=0.9, compat="dycoke") == [30]  # in doubles 0
    packed = compress(torch.randn(1, 7, 6, 4), method="dycoke", compat="dycoke")
    assert packed.frame_counts.tolist() == [6, 1, 1, 1, 6, 1, 0]


def test_dycoke_within_another_budget_and_errors():
    tokens = torch.randn(2, 6, 5, 8)
    assert compress(tokens, method="dycoke", budget=12).frame_counts[[0, 4]].tolist() == [5, 5]
    assert torch.equal(Compressor(method="dycoke")(tokens).index, compress(tokens, method="dycoke").index)
    one_graph(method="dycoke", budget=7)
    for text, change in {"drop as a share": {"drop": 1.5}, "compat None or 'dycoke'": {"compat": "vllm"}}.items():
        with pytest.raises(ValueError, match=text):
            compress(tokens, method="dycoke", **change)
    with pytest.raises(ValueError, match="expected one of budget, total_budget and threshold"):
        compress(tokens)
    with pytest.raises(Exception, match="expected a budget inside a graph: method 'dycoke'"):
        torch.compile(lambda x: compress(x, method="dycoke"), backend="eager", fullgraph=True)(tokens)
