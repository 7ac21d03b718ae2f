"""Methods that merge what is linked: their rules as loops, exact budgets, what the originals found (golden/tokens)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok import Layout, compress
from vtok.methods import scissor, sttm

from clips import moving_square, save, vtok_run
from plain import clip, cosine, first_k, videos

GOLDEN = Path(__file__).with_name("golden") / "tokens"
CASES = {
    case["name"]: case
    for name in ("sttm", "scissor")
    for case in json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
}
GRIDS = [(4, 3, 5), (0, 2, 2), (1, 3, 3), (3, 1, 5), (2, 2, 2), (2, 7, 4)]


def arrays(name):
    golden = np.load(GOLDEN.parent / CASES[name]["file"], allow_pickle=False)
    return {key: torch.from_numpy(golden[key]) for key in golden.files}, CASES[name]["params"]


def named(op):
    return [name for name, case in CASES.items() if case["op"] == op]


@pytest.mark.parametrize("name", named("sttm"))
def test_sttm_as_the_original(name):
    """Nodes, links and, of these, the true components."""
    golden, params = arrays(name)
    steps, h, w, _ = golden["in_x"].shape
    layout, x, tree = Layout.from_grid([(steps, h, w)]), golden["in_x"].flatten(0, 2), params["tree_threshold"]
    box = golden["out_node_tyxyx"].long()
    rows = (box[:, 0] * h + box[:, 1]) * w + box[:, 2]
    node, values, _, _ = sttm.quadtree(x, layout, tree, "sttm")
    assert torch.equal(node.unique(), rows) and torch.equal(node.bincount()[rows], golden["out_node_patches"].long())
    assert torch.allclose(values[rows], golden["out_node_features"], atol=1e-5)

    alike, later = vtok.forest.likeness(values, layout), vtok.forest.before(layout, node)[1]
    linked = (later & (alike >= params["temporal_threshold"])).nonzero()[:, 0]
    number = torch.full((len(x),), -1).index_put((rows,), torch.arange(len(rows)))
    pairs = torch.stack([number[node[linked - h * w]], number[node[linked]]], -1)
    assert {tuple(p) for p in pairs.tolist()} == {tuple(sorted(p)) for p in golden["out_pairs"].tolist()}

    packed = compress(x, layout, method="sttm", threshold=params["temporal_threshold"], tree=tree, compat="sttm").trim()
    assert torch.equal(packed.index[packed.assignment[rows]], rows[golden["out_rep_true"]])
    kept = compress(x, layout, method="sttm", budget=len(packed.index), temporal=params["temporal_threshold"], tree=tree, compat="sttm")  # fmt: skip # noqa: E501
    assert torch.equal(kept.index, packed.index) and torch.equal(kept.assignment, packed.assignment)
    assert torch.allclose(packed.values, golden["out_merged_true"], atol=1e-5)  # every node counts alike
    assert torch.allclose(packed.reduce(x), packed.values, atol=1e-6)


@pytest.mark.parametrize("name", named("scissor_components"))
def test_scissor_as_the_original(name):
    golden, params = arrays(name)
    x, label = golden["in_x"], golden["out_label"]
    layout = Layout.from_grid([(1, 1, len(x))])
    part, _ = scissor.components(x, layout, params["tau"], None)
    assert torch.equal(part[:, None] == part, label[:, None] == label)
    means, _ = vtok.ops.merge(x, *vtok.ops.group(label, int(golden["out_true_components"])))
    assert torch.allclose(means, golden["out_means"], atol=1e-5)


def joined(kept, into):
    """The kept row that each row comes to, or -1."""
    ends = []
    for row in range(len(into)):
        at = row
        while at not in kept and into[at] != at:
            at = into[at]
        ends.append(at if at in kept else -1)
    return ends


def components(count, links):
    label = list(range(count))
    for a, b in links:
        low, high = sorted((label[a], label[b]))
        label = [low if x == high else x for x in label]
    return label


def box_of(y, x, sides):
    """(y0, y1, x0, x1) in tokens of a cell, by the sides of its level and those below, the tokens' last."""
    box = [y, y + 1, x, x + 1]
    for h, w in sides:
        box = [max(2 * box[0] - h % 2, 0), 2 * box[1] - h % 2, max(2 * box[2] - w % 2, 0), 2 * box[3] - w % 2]
    return box


def quadtree(x, h, w, tree, compat):
    """[(box, mean)] of one frame [h·w, D], the cosine of each token to its two by two, its part in its node's mean."""
    levels = [x.view(h, w, -1)]
    while max(levels[-1].shape[:2]) > 2:
        below, (high, wide) = levels[-1], levels[-1].shape[:2]
        means = [below[a:b, c:d].flatten(0, 1).mean(0) for i in range((high + 1) // 2) for j in range((wide + 1) // 2)
                 for a, b, c, d in [box_of(i, j, [(high, wide)])]]  # fmt: skip
        levels.append(torch.stack(means).view((high + 1) // 2, (wide + 1) // 2, -1))
    sides, found, parts = [level.shape[:2] for level in levels], [], torch.ones(h, w)

    def likes(at, i, j):
        a, b, c, d = box_of(i, j, [sides[at - 1]])
        return {(y, z): cosine(levels[at - 1][y, z], levels[at][i, j]) for y in range(a, b) for z in range(c, d)}

    def look(at, i, j):
        children = likes(at, i, j) if at else {}
        whole = all(like >= tree for like in children.values())
        if at and compat and len(children) < 4:
            whole &= bool(cosine(levels[at - 1][0, 0], levels[at][i, j]) >= tree)
        if whole:
            found.append((box_of(i, j, sides[:at][::-1]), levels[at][i, j]))
        if whole:
            divide(at, i, j, 1.0)
        for y, z in () if whole else children:
            look(at - 1, y, z)

    def divide(at, i, j, part):
        if not at:
            parts[i, j] = part
        a, b, c, d = box_of(i, j, [sides[at - 1]]) if at else (0, 0, 0, 0)
        for y in range(a, b):
            for z in range(c, d):
                divide(at - 1, y, z, part / ((b - a) * (d - c)))

    for i in range(sides[-1][0]):
        for j in range(sides[-1][1]):
            look(len(levels) - 1, i, j)
    first = [likes(1, i, j) for i in range(sides[1][0]) for j in range(sides[1][1])] if len(sides) > 1 else []
    return found, {y * w + z: like for cell in first for (y, z), like in cell.items()}, parts.flatten()


def before(row, n):
    """The row that a row of a video goes on to, or itself."""
    return row - n if row >= n else max(row - 1, 0)


def by_rank(alike, opens, parts, within):
    return [
        float(1 - alike[r] if r in opens else -2 - alike[r] if r in parts else -5 - within[r])
        for r in range(len(alike))
    ]


def sttm_rule(x, h, w, tree, least, compat):
    """(into, opens, score, parts) of one video [T, n, D], nodes linked pair by pair of boxes."""
    n, rows = h * w, x.shape[0] * h * w
    node, mean, within, boxes, parts = [0] * rows, [None] * rows, [torch.tensor(1.0)] * rows, [], []
    for t in range(x.shape[0]):
        found, inner, part = quadtree(x[t], h, w, tree, compat)
        boxes.append(found)
        parts += part.tolist() if compat else [1.0] * n
        for site, like in inner.items():
            within[t * n + site] = like
        for (a, b, c, d), value in found:
            for y in range(a, b):
                for z in range(c, d):
                    node[t * n + y * w + z], mean[t * n + y * w + z] = t * n + a * w + c, value
    links = []
    for t in range(1, x.shape[0]):
        for (a, b, c, d), value in boxes[t]:
            for (e, f, g, i), other in boxes[t - 1]:
                nested = (a <= e and f <= b and c <= g and i <= d) or (e <= a and b <= f and g <= c and d <= i)
                if nested and cosine(value, other) >= least:
                    links.append((t * n + a * w + c, (t - 1) * n + e * w + g))
    first = components(rows, links)
    opens = {r for r in range(rows) if node[r] == r and first[r] == r}
    alike = [cosine(mean[before(r, n)], mean[r]) if r else torch.tensor(-torch.inf) for r in range(rows)]
    into = [node[r] if node[r] != r else node[before(r, n)] if r and (r in opens or (r >= n and alike[r] >= least))
            else first[r] for r in range(rows)]  # fmt: skip
    return into, opens, by_rank(alike, opens, set(node), within), parts


def scissor_parts(x, above, size=None):
    """The first row of each row's component in its frame, and in the video."""
    n, rows, flat, part = x.shape[1], x.shape[0] * x.shape[1], x.flatten(0, 1), []
    for t in range(x.shape[0]):
        links = [(a, b) for a in range(n) for b in range(a) if cosine(x[t, a], x[t, b]) > above]
        part += [t * n + r for r in components(n, links)]
    size, means = torch.ones(rows) if size is None else size, {}
    for p in sorted(set(part)):
        mine = [r for r in range(rows) if part[r] == p]
        means[p] = (size[mine, None] * flat[mine]).sum(0) / size[mine].sum()
    links = [(p, q) for p in means for q in means if q < p and cosine(means[p], means[q]) > above]
    over = components(rows, links)
    return part, [over[p] for p in part]


def scissor_rule(x, h, w, above, size=None):
    n, rows, flat = h * w, x.shape[0] * h * w, x.flatten(0, 1)
    part, first = scissor_parts(x, above, size)
    opens = {r for r in range(rows) if first[r] == r}
    alike = [cosine(flat[before(r, n)], flat[r]) if r else torch.tensor(-torch.inf) for r in range(rows)]
    into = [part[r] if part[r] != r else part[before(r, n)] if r in opens else first[r] for r in range(rows)]
    return into, opens, by_rank(alike, opens, set(part), alike), [1.0] * rows


AMOUNTS = [{"threshold": 0.4}, {"budget": "80%"}, {"budget": "30%"}, {"budget": 2}, {"budget": [40, 2, 9, 0, 3, 50]}]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
@pytest.mark.parametrize("method", ["sttm", "sttm-compat", "scissor"])
def test_by_the_rule(method, amount, extra):
    torch.manual_seed(extra)
    tokens, kept, ends, score, shares = clip(GRIDS, extra), [], [], [], []
    rows = vtok.plan(GRIDS, budget=amount.get("budget"))
    for (start, (_, h, w), x), k in zip(videos(tokens, GRIDS, extra), rows, strict=True):
        into, opens, rank, parts = scissor_rule(x, h, w, 0.4) if method == "scissor" else sttm_rule(x, h, w, 0.3, 0.4, method != "sttm")  # fmt: skip # noqa: E501
        some = first_k(rank, k) if "budget" in amount else sorted(opens)
        more = range(len(into), len(into) + extra)
        kept += [start + r for r in (*some, *more)]
        ends += [start + r if r >= 0 else -1 for r in (*joined(set(some), into), *more)]
        score += [*rank, *[torch.inf] * extra]
        shares += [*parts, *[1.0] * extra]
    name, options = {
        "sttm": ("sttm", {"tree": 0.3}), "sttm-compat": ("sttm", {"tree": 0.3, "compat": "sttm"}),
        "scissor": ("scissor", {}),
    }[method]  # fmt: skip
    if "budget" in amount:
        options |= {"temporal": 0.4} if name == "sttm" else {"similarity": 0.4}
    packed = compress(tokens, GRIDS, extra_rows=extra, method=name, **amount, **options).trim()
    assert packed.scores.nan_to_num(7).tolist() == torch.tensor(score).nan_to_num(7).tolist()
    assert packed.index.tolist() == kept
    assert packed.assignment.tolist() == [kept.index(end) if end >= 0 else -1 for end in ends]
    shares = torch.tensor(shares)[:, None]
    for slot, value in enumerate(packed.values):
        mine = packed.assignment == slot
        mean = (tokens[mine] * shares[mine]).sum(0) / shares[mine].sum()
        assert torch.allclose(value, mean, atol=1e-5, equal_nan=True)
    assert method != "sttm-compat" or shares.min() < 0.1
    assert torch.equal(packed.weight, (packed.assignment[:, None] == torch.arange(len(kept))).sum(0).float())


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 6)), max_size=3),
    st.sampled_from(["sttm", "scissor"]),
    st.integers(0, 2),
    st.data(),
)
def test_any_budget_is_met_and_nothing_is_lost(grids, method, extra, data):
    layout = Layout.from_grid(grids, extra_rows=extra)
    budget = [data.draw(st.integers(1, max(t * h * w, 1))) for t, h, w in grids]
    tokens = torch.randint(-2, 3, (layout.total, 4)).float()
    packed = compress(tokens, layout, budget=budget, method=method)
    sizes = [t * h * w for t, h, w in grids]
    assert packed.cu_seqlens.diff().tolist() == [min(k, n) + extra for k, n in zip(budget, sizes, strict=True)]
    assert torch.equal(packed.assignment[packed.index], torch.arange(len(packed.index)))
    assert (packed.assignment >= 0).all() and packed.weight.sum() == layout.total
    video = layout.video_of(torch.arange(layout.total)) if grids else packed.index
    assert torch.equal(video[packed.index[packed.assignment]], video)
    again = compress(tokens, layout, budget=sum(sizes), method=method) if sum(sizes) else packed
    assert (again.weight == 1).all() or not sum(sizes)
    for v, alone in enumerate(packed.split()):  # what the video gives by itself
        part = tokens[layout.cu_seqlens[v] : layout.cu_seqlens[v + 1]]
        if sizes[v]:
            own = compress(part, [grids[v]], extra_rows=extra, budget=budget[v], method=method)
            assert torch.equal(own.index, alone.index) and torch.equal(own.values, alone.values)


@pytest.mark.parametrize("method", ["sttm", "scissor"])
def test_still_and_cut(method):
    """A still video is one frame; what is nowhere alike stays whole; a scene that comes back joins in scissor alone."""
    still = torch.randn(1, 1, 16, 64).repeat(1, 5, 1, 1).view(1, 5, 4, 4, 64)
    packed = compress(still, threshold=0.9, method=method).trim()
    assert packed.index.tolist() == list(range(16)) and packed.weight.tolist() == [5.0] * 16
    assert torch.allclose(packed.values, still[0, 0].flatten(0, 1))
    apart = torch.eye(48).view(1, 3, 4, 4, 48)
    assert compress(apart, threshold=0.9, method=method).trim().index.tolist() == list(range(48))
    back = torch.cat([still[:, :1], apart[..., :1, :, :, :].new_ones(1, 1, 4, 4, 64), still[:, :1]], 1)
    assert compress(back, threshold=0.9, method=method).trim().weight[:16].tolist() == [2.0 if method == "scissor" else 1.0] * 16  # fmt: skip # noqa: E501
    flat = torch.ones(1, 2, 5, 7, 3)
    assert compress(flat, threshold=0.9, method=method).trim().weight.tolist() == (
        [70.0] if method == "scissor" else [6.0, 8.0, 24.0, 32.0]  # the four cells at the top
    )


def test_weights_and_low_precision():
    x, sizes = torch.randn(1, 4, 4, 4, 8).bfloat16(), torch.rand(64) + 0.5
    for method in ("sttm", "scissor"):
        packed = compress(x, budget=9, method=method, weights=sizes)
        assert packed.values.dtype == torch.bfloat16
        assert torch.allclose(packed.weight, torch.zeros(9).index_add(0, packed.assignment, sizes))
    assert compress(x.double(), budget=9, method="sttm").values.dtype == torch.float64
    nodes = {"budget": 9, "method": "sttm", "compat": "sttm", "tree": 0.0}
    plain, sized = (compress(x.double(), weights=w, **nodes) for w in (None, sizes))
    assert torch.equal(sized.index, plain.index) and torch.equal(sized.shares, plain.shares * sizes)
    assert torch.allclose(sized.weight, torch.zeros(9).index_add(0, sized.assignment, sizes))


@pytest.mark.parametrize("amount", [{"budget": 9}, {"budget": "30%"}, {"threshold": 0.4}], ids=str)
@pytest.mark.parametrize("method, options", [("sttm", {}), ("sttm", {"compat": "sttm"}), ("scissor", {})], ids=str)
def test_one_graph(method, options, amount):
    torch._dynamo.reset()
    call = lambda x: compress(x, method=method, **options, **amount)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for shape in ((2, 3, 5, 7, 6), (3, 4, 6, 8, 6), (4, 2, 7, 5, 6)):  # pyramids of one height
            x = torch.randn(shape)
            packed, want = compiled(x), call(x)
            assert torch.equal(packed.index, want.index) and torch.equal(packed.assignment, want.assignment)
            assert torch.equal(packed.values, want.values)


def test_scissor_in_a_ragged_graph_and_sttm_not():
    layout, x = Layout.from_grid([(3, 2, 4), (2, 2, 2)], extra_rows=1), torch.randn(34, 5)
    for method in ("scissor", "sttm"):
        call = torch.compile(lambda x, g, m=method: compress(x, g, budget=4, method=m), backend="eager", fullgraph=True)
        if method == "scissor":
            assert torch.equal(call(x, layout).index, compress(x, layout, budget=4, method=method).index)
        else:
            with pytest.raises(Exception, match="expected dense tokens inside a graph"):
                call(x, layout)


def test_errors():
    tokens = torch.randn(1, 2, 3, 3, 4)
    for text, change in {
        "expected compat None or 'sttm', got 'tree'": {"budget": 3, "compat": "tree"},
        "expected temporal under a budget, got 0.5 under a threshold": {"threshold": 0.4, "temporal": 0.5},
    }.items():
        with pytest.raises(ValueError, match=text):
            compress(tokens, method="sttm", **change)
    with pytest.raises(ValueError, match="method 'scissor': expected compat None or 'scissor', got 'sttm'"):
        compress(tokens, method="scissor", budget=3, compat="sttm")
    with pytest.raises(TypeError, match="expected options among"):
        compress(tokens, method="scissor", budget=3, tree=0.5)


@pytest.mark.parametrize("method", ["sttm", "scissor"])
@pytest.mark.parametrize("amount", [["--keep", "25%"], ["--threshold", "0.9"]], ids=" ".join)
def test_on_the_command_line(tmp_path, capfd, method, amount):
    video = save(tmp_path / "square.mkv", moving_square())
    code, text, _ = vtok_run(capfd, "compress", video, "--method", method, *amount, "--out", tmp_path / "out")
    assert code == 0 and f"PSNR, {method}" in text
    assert (tmp_path / "out" / "sheet.png").exists()
