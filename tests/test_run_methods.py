"""The methods that average tokens along the frames against their rules written as loops."""

from __future__ import annotations

import math

import pytest
import torch

import vtok
from vtok import Layout, compress
from vtok.methods import grt

from plain import GRIDS, clip, cosine, first_k, one_graph, videos


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 16])
@pytest.mark.parametrize("amount", [{"threshold": 0.4}, {"budget": "60%"}, {"budget": 3}], ids=str)
def test_mavors(amount, chunk, extra):
    tokens, kept, into = clip(GRIDS, extra), [], {}
    rows = vtok.plan(GRIDS, budget=amount.get("budget"))
    for (start, (t, h, w), x), k in zip(videos(tokens, GRIDS, extra), rows, strict=True):
        n = h * w
        alike = [cosine(x[f - chunk, i], x[f, i]) if f >= chunk else -math.inf for f in range(t) for i in range(n)]
        opens = [at for at, a in enumerate(alike) if not a > 0.4]
        if "budget" in amount:
            opens = first_k([float(1 - a) for a in alike], k)
        for at in range(t * n):
            back = at
            while back >= 0 and back not in opens:
                back -= chunk * n
            into[start + at] = start + back if back >= 0 else -1
        kept += [start + at for at in opens] + [start + t * n + i for i in range(extra)]
        into |= {start + t * n + i: start + t * n + i for i in range(extra)}
    packed = compress(tokens, GRIDS, extra_rows=extra, method="mavors", chunk=chunk, **amount).trim()
    assert packed.index.tolist() == kept
    assert packed.assignment.tolist() == [kept.index(g) if (g := into[row]) >= 0 else -1 for row in range(len(tokens))]
    assert packed.weight.sum() == (packed.assignment >= 0).sum()


def test_mavors_averages_alike_chunks():
    tokens = torch.randn(1, 3, 4, 6).repeat(1, 3, 1, 1) * torch.tensor([1.0, 2, 3]).repeat_interleave(3)[:, None, None]
    packed = compress(tokens, threshold=0.99, method="mavors", chunk=3).trim()
    assert torch.allclose(packed.values, tokens[0, 3:6].flatten(0, 1)) and packed.weight.tolist() == [3.0] * 12
    one_graph(method="mavors", threshold=0.2, chunk=2), one_graph(method="mavors", budget=9, chunk=2)
    with pytest.raises(ValueError, match="expected chunk >= 1, got 0"):
        compress(tokens, threshold=0.99, method="mavors", chunk=0)


@pytest.mark.parametrize("hops, values", [("one", [55.0]), ("full", [37.0])])
def test_b_vllm_chain(hops, values):
    angle = torch.tensor([0.0, 0.9, 1.8])  # a cosine of 0.62 to the next, of -0.23 to the one after
    tokens = torch.tensor([100.0, 10, 1]).view(1, 3, 1, 1)
    mixed = torch.stack([angle.cos(), angle.sin()], -1)
    packed = compress(tokens, threshold=0.75, method="b_vllm", hops=hops, distributions=mixed).trim()
    assert packed.values[:, 0].tolist() == values and packed.index.tolist() == [0]
    assert packed.assignment.tolist() == ([0, 0, -1] if hops == "one" else [0, 0, 0])


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("hops", ["one", "full"])
@pytest.mark.parametrize("threshold", [0.75, 0.6, 0.999, -0.5, -math.inf])
def test_b_vllm(threshold, hops, extra):
    frames = sum(t for t, _, _ in GRIDS)
    tokens, mixed = torch.randn(sum(t * h * w + extra for t, h, w in GRIDS), 5), torch.rand(frames, 3) - 0.3
    mixed[3], mixed[2] = mixed[1], math.nan
    kept, into, at = [], {}, 0
    for start, (t, h, w), _ in videos(tokens, GRIDS, extra):
        n, unit = h * w, torch.nn.functional.normalize(mixed[at : at + t], dim=-1)
        alike = ((unit @ unit.T + 1) / 2).nan_to_num(-math.inf).tolist()
        link = {}
        for i in range(1, t):
            best = max(range(i), key=lambda j: (alike[i][j], -j))
            if alike[i][best] > threshold:
                link[i] = best
        for i in range(t):
            to = link.get(i, i)
            while hops == "full" and to in link:
                to = link[to]
            for s in range(n):
                into[start + i * n + s] = start + to * n + s if to not in link else -1
        kept += [start + i * n + s for i in range(t) if i not in link for s in range(n)]
        kept += [start + t * n + i for i in range(extra)]
        into |= {start + t * n + i: start + t * n + i for i in range(extra)}
        at += t
    settings = {"threshold": threshold, "hops": hops, "distributions": mixed}
    packed = compress(tokens, GRIDS, extra_rows=extra, method="b_vllm", **settings).trim()
    assert packed.index.tolist() == kept
    assert packed.assignment.tolist() == [kept.index(g) if (g := into[row]) >= 0 else -1 for row in range(len(tokens))]
    assert torch.equal(packed.weight, (packed.assignment[:, None] == torch.arange(len(kept))).sum(0).float())


def test_b_vllm_links_of_a_video_do_not_depend_on_the_others():
    settings = {"method": "b_vllm", "threshold": 0.75, "hops": "one"}
    for seed in range(60):
        torch.manual_seed(seed)
        mixed = torch.rand(10, 68)
        mixed[7:] = mixed[7]  # equal: the earliest counts
        packed = compress(torch.randn(10, 2), [(7, 1, 1), (3, 1, 1)], distributions=mixed, **settings).trim().split()[1]
        assert packed.assignment.tolist() == [0, 0, 0]
        alone = compress(torch.randn(3, 2), [(3, 1, 1)], distributions=mixed[7:], **settings).trim()
        assert alone.assignment.tolist() == [0, 0, 0]


@pytest.mark.parametrize("hops", ["one", "full"])
def test_b_vllm_is_one_graph(hops):
    torch._dynamo.reset()
    call = lambda x, g, d: compress(x, g, method="b_vllm", threshold=0.7, hops=hops, distributions=d)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for grids in ([(3, 2, 4), (2, 2, 2)], [(50, 1, 4), (6, 2, 6), (3, 2, 2)]):
            layout = Layout.from_grid(grids, extra_rows=1)
            tokens, mixed = torch.randn(layout.total, 20), torch.rand(layout.frames, 7)
            packed, want = compiled(tokens, layout, mixed), call(tokens, layout, mixed)
            assert torch.equal(packed.index, want.index) and torch.equal(packed.values, want.values)


@pytest.mark.parametrize("hops", ["one", "full"])
def test_b_vllm_rows_that_a_frame_keeps_are_themselves(hops):
    tokens, mixed = torch.randn(1, 3, 4, 5), torch.tensor([[1.0, 0]]).repeat(3, 1)
    packed = compress(tokens, method="b_vllm", threshold=0.75, hops=hops, distributions=mixed, min_per_frame=1).trim()
    assert packed.index.tolist() == [0, 1, 2, 3, 4, 8] and packed.assignment[packed.index].tolist() == list(range(6))
    assert packed.weight.tolist() == [1, 3, 3, 3, 1, 1] and torch.equal(packed.values[[0, 4, 5]], tokens[0, :, 0])


def test_b_vllm_at_the_ends():
    mixed, tokens = torch.rand(4, 3), torch.randn(2, 2, 3, 5)
    none = compress(
        torch.randn(2, 5), [(0, 2, 2)], extra_rows=2, method="b_vllm", threshold=0.7, distributions=mixed[:0]
    )
    assert none.index.tolist() == [0, 1]
    for text, change in {
        "expected a threshold, got a budget": {"budget": 3},
        "expected hops 'full' or 'one', got 2": {"threshold": 0.7, "hops": 2},
        r"expected distributions of shape \[4, M\], got none": {"threshold": 0.7, "distributions": None},
        r"expected distributions of shape \[4, M\], got \(3, 3\)": {"threshold": 0.7, "distributions": mixed[:3]},
    }.items():
        with pytest.raises(ValueError, match=text):
            compress(tokens, method="b_vllm", **{"distributions": mixed, **change})


def test_grt_second_stage():
    keep = torch.rand(2, 6, 3, 4) < torch.tensor([0.1, 0.9, 0.3, 1.0, 0.0, 0.95])[:, None, None]
    cuts, score = grt.scene_cuts(keep, 0.8), torch.rand(2, 6, 3, 4)
    assert cuts.tolist() == [[t == 0 or int(keep[b, t].sum()) > 9 for t in range(6)] for b in range(2)]
    assert grt.scene_cuts(torch.ones(1, 2, 1, 5).bool() & (torch.arange(5) < 4)).tolist() == [[True, False]]
    before = [[max([0] + [s for s in range(t) if cuts[b, s]]) for t in range(6)] for b in range(2)]
    assert grt.cut_before(cuts).tolist() == before
    divergence = torch.rand(2, 6)
    divergence[0, 3] = math.nan
    distinct = grt.distinct_cuts(cuts, divergence, 0.5)
    assert distinct.tolist() == [[bool(cuts[b, t]) and (t == 0 or not divergence[b, t] < 0.5) for t in range(6)]
                                 for b in range(2)]  # fmt: skip
    score[:, 0], tokens = math.inf, torch.randn(2, 6, 12, 8)
    rank = grt.second_score(score, tokens, distinct)
    rows = grt.packed_rows(12, 0.4, least=3)
    packed = compress(tokens, scores=rank, budget=[[rows] * 6] * 2)
    for b in range(2):
        for t in range(6):
            ranked = tokens[b, t].norm(dim=-1) if distinct[b, t] else score[b, t].flatten()
            kept = packed.index[(packed.index // 12) == b * 6 + t] % 12
            assert kept.tolist() == first_k(ranked.tolist(), rows)
    assert grt.scene_cuts(keep[:, :0]).shape == grt.cut_before(cuts[:, :0]).shape == (2, 0)
