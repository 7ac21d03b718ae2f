"""Clips of tokens, and what the tests of methods write out plainly: the rules' cosine, their choice, a graph."""

from __future__ import annotations

import math

import torch

import vtok
from vtok import Layout, compress

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
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for grids in ([(3, 2, 4), (2, 2, 2)], [(5, 4, 4), (6, 2, 6), (3, 2, 2)]):
            layout = Layout.from_grid(grids, extra_rows=1)
            tokens = torch.randn(layout.total, 20)
            packed, want = compiled(tokens, layout), call(tokens, layout)
            assert torch.equal(packed.index, want.index) and torch.equal(packed.values, want.values)
