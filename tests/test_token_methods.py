"""The token methods against their rules written as loops: budgets, ties, NaN, short and ragged videos."""

from __future__ import annotations

import math

import pytest
import torch

import vtok
from vtok import Compressor, Layout, compress
from vtok.methods import dtd, vidcom2

from plain import GRIDS, clip, cosine, first_k, one_graph, videos


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


def vidcom2_frames(x, share):
    """Redundancy [T][n] of one video in float64, and the rows that each frame keeps."""
    x = x.double()
    t, n, d = x.shape
    fine = x.isfinite().all(-1)
    rows = x[fine]
    low = rows.var(0, correction=0).argsort(stable=True)[: max(1, d // 2)]
    f = torch.nn.functional.normalize(x[..., low], dim=-1)

    def near(a, centre):
        return float(sum(math.exp(-float((a - centre).square().sum()) / (2 * s)) for s in (0.125, 0.25, 0.5, 1, 2)))

    middle = f[fine].mean(0)
    to_video = [[near(f[a, i], middle) if fine[a, i] else math.nan for i in range(n)] for a in range(t)]
    red = [[to_video[a][i] + near(f[a, i], f[a][fine[a]].mean(0)) if fine[a, i] else math.nan for i in range(n)]
           for a in range(t)]  # fmt: skip
    far = torch.tensor([-sum(v for v in row if v == v) / max(1, sum(v == v for v in row)) for row in to_video])
    far[~fine.any(1)] = -math.inf
    p = ((far - far.max()) / 0.01).softmax(0)
    k = [min(max(round(min(1.0, share * (1 + float(p[a] - p.mean()))) * n), 1), n) for a in range(t)]
    return red, [first_k([-v for v in red[a]], k[a]) for a in range(t)]


def vidcom2_clip(extra=0, channels=12):
    tokens = torch.randn(sum(t * h * w + extra for t, h, w in GRIDS), channels) + 2
    tokens[3] = tokens[1]  # a tie
    tokens[:6] += torch.randn(12)  # an unusual frame
    tokens[8, 2], tokens[9] = math.nan, 0
    return tokens


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("budget", [0.25, 0.6, 4, 1, [40, 0, 3, 17, 1]], ids=str)
def test_vidcom2(budget, extra):
    tokens, kept, layout = vidcom2_clip(extra), [], Layout.from_grid(GRIDS, extra_rows=extra)
    rows = vtok.plan(GRIDS, budget=budget)
    for (start, (t, h, w), x), k in zip(videos(tokens, GRIDS, extra), rows, strict=True):
        if t:
            red, within = vidcom2_frames(x, k / (t * h * w))
            key = [(i not in within[a], math.isnan(red[a][i]), red[a][i], a * h * w + i)
                   for a in range(t) for i in range(h * w)]  # fmt: skip
            key = [(True, True, 0, at) if nan else (out, nan, r, at) for out, nan, r, at in key]
            kept += [start + at for at in sorted(at for *_, at in sorted(key)[:k])]
        kept += [start + t * h * w + i for i in range(extra)]
    packed = compress(tokens, layout, budget=budget, method="vidcom2")
    assert packed.index.tolist() == kept
    for v, alone in enumerate(packed.split()):  # to the bit what the video gives by itself
        part = tokens[layout.cu_seqlens[v] : layout.cu_seqlens[v + 1]]
        if rows[v]:
            again = compress(part, [GRIDS[v]], extra_rows=extra, budget=rows[v], method="vidcom2")
            assert torch.equal(again.index, alone.index)
            assert torch.equal(again.scores.nan_to_num(1), alone.scores.nan_to_num(1))


def test_vidcom2_of_the_authors_in_a_batch():
    tokens, layout, kept = vidcom2_clip(1), Layout.from_grid(GRIDS, extra_rows=1), []
    for start, (t, h, w), x in videos(tokens, GRIDS, 1):
        if t:
            kept += [start + a * h * w + i for a, row in enumerate(vidcom2_frames(x, 0.4)[1]) for i in row]
    assert vidcom2.reference_mask(tokens, layout, 0.4).nonzero()[:, 0].tolist() == kept


def test_vidcom2_at_the_ends():
    one = torch.randn(1, 1, 6, 8)
    assert compress(one, budget=4, method="vidcom2").values.shape == (4, 8)
    still = torch.randn(1, 1, 6, 8).repeat(1, 5, 1, 1)
    assert compress(still, budget=10, method="vidcom2").frame_counts.tolist() == [2] * 5
    nothing = torch.full((1, 3, 2, 4), math.nan)
    assert compress(nothing, budget=3, method="vidcom2").index.tolist() == [0, 1, 2]
    assert compress(torch.randn(1, 0, 2, 4), budget=3, method="vidcom2").index.shape == (0,)
    assert vidcom2.reference_mask(torch.randn(2, 4), Layout.from_grid([(0, 1, 1)], extra_rows=2), 0.5).sum() == 0
    assert [vidcom2.vllm_rows(16, 240, q) for q in (0.9, 0.999, 0.0)] == [383, 16, 3840]
    with pytest.raises(ValueError, match="method 'vidcom2': expected a budget, got a threshold"):
        compress(one, threshold=0.5, method="vidcom2")
    one_graph(method="vidcom2", budget=7), one_graph(method="vidcom2", budget="30%")


def longvu_kept(x, threshold, block, most):
    """The rows [T][n] that stay of one video, by the rule with its cap."""
    t, n, _ = x.shape
    keep = [[True] * n for _ in range(t)]
    if most is not None and t * n <= most:
        return keep
    reference = list(x[0]) if t else []
    for f in range(t):
        for i in range(n):
            if f % block == 0:
                reference[i] = x[f, i]
                continue
            likeness = cosine(reference[i], x[f, i])
            keep[f][i] = not likeness >= threshold
            if likeness.isnan():
                reference[i] = x[f, i]
    over = sum(map(sum, keep)) - most if most is not None else 0
    if over <= 0:
        return keep
    blocks = range(0, t, block)
    for start in blocks:
        kept = [(f, i) for f in range(start, min(start + block, t)) for i in range(n) if keep[f][i]]
        for f, i in kept[max(0, len(kept) - math.ceil(over / len(blocks))) :]:
            keep[f][i] = False
    for f, i in [(f, i) for f in range(t) for i in range(n) if keep[f][i]][most:]:
        keep[f][i] = False
    return keep


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("most", [None, 30, 20, 7, 1, 0])
@pytest.mark.parametrize("block", [3, 8, 1])
def test_longvu_stc(block, most, extra):
    tokens, kept = clip(GRIDS, extra), []
    for start, (t, h, w), x in videos(tokens, GRIDS, extra):
        keep = longvu_kept(x, 0.4, block, most)
        kept += [start + f * h * w + i for f in range(t) for i in range(h * w) if keep[f][i]]
        kept += [start + t * h * w + i for i in range(extra)]
    settings = {"threshold": 0.4, "block": block, "most": most}
    packed = compress(tokens, GRIDS, extra_rows=extra, method="longvu_stc", **settings).trim()
    assert packed.index.tolist() == kept
    sites, starts = packed.layout.tokens_per_frame, packed.layout.cu_seqlens
    for row, slot in enumerate(packed.assignment.tolist()):
        video = int(packed.layout.video_of(torch.tensor([row])))
        step = (row - int(starts[video])) // max(1, int(sites[video])) % block
        into = row if row in kept else row - step * int(sites[video])
        assert slot == (kept.index(into) if into in kept else -1)


def test_longvu_stc_under_a_budget():
    tokens = torch.randn(2, 10, 3, 8)
    packed = compress(tokens, budget=9, method="longvu_stc", block=5)
    assert packed.frame_counts[[0, 5, 10, 15]].tolist() == [3] * 4 and packed.values.shape[0] == 18
    likeness = torch.stack([cosine(tokens[0, f // 5 * 5, i], tokens[0, f, i]) for f in range(10) for i in range(3)])
    rest = [row for row in range(30) if row // 3 % 5]
    least = sorted(rest, key=lambda row: (float(likeness[row]), row))[:3]
    assert packed.index[:9].tolist() == sorted([0, 1, 2, 15, 16, 17, *least])
    one_graph(method="longvu_stc", threshold=0.2, most=30), one_graph(method="longvu_stc", budget=8)
    for text, change in {"block >= 1": {"block": 0}, "most under a threshold": {"most": 4}}.items():
        with pytest.raises(ValueError, match=text):
            compress(tokens, budget=9, method="longvu_stc", **change)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("budget", ["80%", "40%", "10%", 1, [42, 0, 3, 17, 1]], ids=str)
def test_framefusion(budget, important, extra):
    tokens, similarity = clip(GRIDS, extra), 0.3
    importance = torch.randint(0, 4, (len(tokens),)).float() if important else None
    rows, kept, group = vtok.plan(GRIDS, budget=budget), [], {}
    for (start, (t, h, w), x), k in zip(videos(tokens, GRIDS, extra), rows, strict=True):
        n = h * w
        alike = [cosine(x[f - 1, i], x[f, i]) if f else torch.tensor(-math.inf) for f in range(t) for i in range(n)]
        heads = [at for at, a in enumerate(alike) if not a >= similarity]
        rest = [at for at in range(t * n) if at not in heads]
        rank = [float(importance[start + at] if important else 1 - alike[at]) for at in heads]
        some = [heads[at] for at in first_k(rank, min(k, len(heads)))]
        some += [rest[at] for at in first_k([-float(alike[at]) for at in rest], k - len(some))]
        if not important and any(math.isnan(r) for r in rank):  # NaN comes last of all
            numbers = [at for at in range(t * n) if not alike[at].isnan()]
            key = {at: float(1 - alike[at]) if at in heads else -float(alike[at]) for at in numbers}
            some = sorted(numbers, key=lambda at: (-key[at], at))[:k]
            some += [at for at in range(t * n) if at not in numbers][: k - len(some)]
        for at in range(t * n):
            back = at
            while back not in heads and back not in some:
                back -= n
            group[start + at] = start + back if back in some else -1
        kept += [start + at for at in sorted(some)] + [start + t * n + i for i in range(extra)]
        group |= {start + t * n + i: start + t * n + i for i in range(extra)}
    settings = {"budget": budget, "similarity": similarity, "importance": importance}
    packed = compress(tokens, GRIDS, extra_rows=extra, method="framefusion", **settings)
    assert packed.index.tolist() == kept
    assert packed.assignment.tolist() == [kept.index(g) if (g := group[row]) >= 0 else -1 for row in range(len(tokens))]
    want, weight = tokens.new_zeros(len(kept), tokens.shape[1]), packed.weight
    for row, slot in enumerate(packed.assignment.tolist()):
        want[slot] += tokens[row] if slot >= 0 else 0
    assert torch.allclose(packed.values, want / weight[:, None], atol=1e-5, equal_nan=True)
    assert weight.sum() == (packed.assignment >= 0).sum()


def test_framefusion_merges_at_the_threshold_itself():
    tokens = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).view(1, 4, 1, 2)
    kept = {name: compress(tokens, threshold=1.0, method=name).trim().index.tolist() for name in ("framefusion", "dtd")}
    assert kept == {"framefusion": [0, 2], "dtd": [0, 1, 2, 3]}
    still = torch.randn(1, 1, 2, 64).bfloat16().repeat(1, 200, 1, 1)
    assert torch.equal(compress(still, threshold=0.6, method="framefusion").trim().values, still[0, 0])
    one_graph(method="framefusion", budget=9), one_graph(method="framefusion", threshold=0.3)
    errors = {
        "importance under a budget": {"threshold": 0.5, "importance": torch.ones(4)},
        "similarity above 0": {"budget": 2, "similarity": 0.0},
        "importance of floats": {"budget": 2, "importance": torch.ones(3)},
    }
    for text, change in errors.items():
        with pytest.raises(ValueError, match=text):
            compress(tokens, method="framefusion", **change)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dtd", "threshold": 0.5}, {"method": "dycoke"}, {"method": "vidcom2", "budget": 5},
        {"method": "longvu_stc", "threshold": 0.5, "most": 9}, {"method": "framefusion", "budget": 5},
        {"method": "mavors", "threshold": 0.5, "chunk": 2},
        {"method": "b_vllm", "threshold": 0.5, "distributions": None},
    ],
    ids=lambda s: s["method"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (1, 1, 1, 1), (0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)], ids=str)
def test_no_value_is_read_on_the_host_and_nothing_is_too_small(settings, shape):
    if "distributions" in settings:
        settings = {**settings, "distributions": torch.rand(shape[0] * shape[1], 3)}
    kept = compress(torch.randn(shape), **settings)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = compress(torch.randn(shape), **settings)
        assert (fake.values.shape, fake.assignment.shape) == (kept.values.shape, kept.assignment.shape)
