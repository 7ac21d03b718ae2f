"""Packed: what can be taken, rebuilt, padded, trimmed and written."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vtok import Layout, Packed, _file, compress, gate_patches
from vtok.ops import group, merge

GRIDS = [(3, 2, 4), (0, 2, 2), (1, 3, 3), (5, 1, 6)]
ragged = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(1, 3)), max_size=4)


def packed_by(grids=GRIDS, extra=0, budget=7, channels=5, **kwargs):
    layout = Layout.from_grid(grids, extra_rows=extra)
    tokens, scores = torch.randn(layout.total, channels), torch.randn(layout.total)
    return tokens, compress(tokens, layout, budget=budget, scores=scores, **kwargs)


def merged_by(assignment, layout, tokens):
    """A Packed of merged rows, as a merging method would return it."""
    k = int(assignment.max()) + 1
    members, offsets = group(assignment, k)
    values, weight = merge(tokens, members, offsets)
    index = members[offsets[:-1]]
    cu = torch.searchsorted(index, layout.cu_seqlens)
    return Packed(values, index, cu, layout, weight=weight, assignment=assignment, longest=int(cu.diff().max()))


@pytest.mark.parametrize("extra", [0, 2])
def test_assignment_mask_weight(extra):
    _, packed = packed_by(extra=extra)
    slots = dict(zip(packed.index.tolist(), range(packed.index.shape[0]), strict=True))
    assert packed.assignment.tolist() == [slots.get(row, -1) for row in range(packed.layout.total)]
    assert packed.mask.tolist() == [row in slots for row in range(packed.layout.total)]
    assert packed.weight.tolist() == [1.0] * len(slots)
    assert packed.weight.dtype == torch.float32


FIELDS = ("values", "index", "positions", "weight", "scores", "cu_seqlens", "assignment", "counts", "mask")


def same(a, b):
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert x is y is None or torch.equal(x, y), name
    assert (a.layout.grids, a.layout.extra_rows, a.longest) == (b.layout.grids, b.layout.extra_rows, b.longest)


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("rule", [{"budget": 7}, {"threshold": 0.3}])
def test_split_is_each_video_alone(rule, extra, touched):
    layout = Layout.from_grid(GRIDS, extra_rows=extra)
    tokens, scores = torch.randn(layout.total, 5), torch.randn(layout.total)
    packed = compress(tokens, layout, scores=scores, **rule)
    if touched:
        assert packed.positions is not None and packed.assignment is not None
    parts = packed.split()
    assert len(parts) == len(GRIDS)
    for part, grid, start, stop in zip(parts, GRIDS, layout.cu_seqlens, layout.cu_seqlens[1:], strict=False):
        alone = compress(tokens[start:stop], [grid], extra_rows=extra, scores=scores[start:stop], **rule)
        same(part, alone.trim())
    assert packed.values.shape[0] == 0 or parts[0].values.data_ptr() == packed.values.data_ptr()


def test_split_merged():
    layout = Layout.from_grid([(2, 1, 2), (2, 1, 3)])
    assignment = torch.tensor([0, 1, 0, -1, 2, 3, 3, 2, -1, 3])
    packed = merged_by(assignment, layout, torch.randn(10, 3))
    first, second = packed.split()
    assert first.assignment.tolist() == [0, 1, 0, -1] and second.assignment.tolist() == [0, 1, 1, 0, -1, 1]
    assert first.weight.tolist() == [2, 1] and second.weight.tolist() == [2, 3] and second.index.tolist() == [0, 1]
    x = torch.randn(6, 3)
    assert torch.equal(second.reduce(x), packed.reduce(torch.cat([torch.zeros(4, 3), x]))[2:])


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.uint8])
def test_take(shape, dtype):
    _, packed = packed_by()
    x = torch.randint(0, 250, (packed.layout.total, *shape)).to(dtype)
    assert torch.equal(packed.take(x), x[packed.index])
    with pytest.raises(ValueError, match="expected x with one row per source row"):
        packed.take(x[1:])


def test_take_keeps_integers_that_activations_lose():
    _, packed = packed_by()
    ids = torch.arange(packed.layout.total) + 2**40
    assert torch.equal(packed.take(ids), packed.index + 2**40)


def test_take_of_padding_is_zero():
    packed = compress(torch.randn(1, 2, 3, 4), threshold=0.0, scores=torch.tensor([1.0, -1, 1, -1, -1, 1]))
    assert packed.take(torch.arange(1, 7)).tolist() == [1, 3, 6, 0, 0, 0]
    assert packed.weight.tolist() == [1, 1, 1, 0, 0, 0]
    assert packed.positions[3:].tolist() == [[-1, -1, -1]] * 3


def brute_unmerge(packed, fill):
    layout, sites, kept = packed.layout, [], {}
    starts = layout.cu_seqlens.tolist()
    for video, (t, h, w) in enumerate(layout.grids):
        for i in range(starts[video + 1] - starts[video]):
            sites.append((video, i % max(h * w, 1) if i < t * h * w else ("extra", i)))
    slots = packed.assignment.tolist()
    for site, slot in zip(sites, slots, strict=True):
        kept.setdefault(site, []).append(slot)
    rows, seen = [], dict.fromkeys(kept, -1)
    for site, slot in zip(sites, slots, strict=True):
        first = next((k for k in kept[site] if k >= 0), -1)
        seen[site] = slot if slot >= 0 else seen[site]
        held = slot if fill == "zero" else seen[site] if seen[site] >= 0 else first
        rows.append(packed.values[held] if held >= 0 else torch.zeros_like(packed.values[0]))
    return torch.stack(rows) if rows else packed.values


@settings(deadline=None, max_examples=60)
@given(ragged, st.integers(1, 12), st.integers(0, 2), st.sampled_from(["zero", "hold"]), st.integers(0, 99))
def test_unmerge(grids, budget, extra, fill, seed):
    torch.manual_seed(seed)
    _, packed = packed_by(grids, extra, budget)
    assert torch.equal(packed.unmerge(fill=fill), brute_unmerge(packed, fill))


def test_unmerge_rebuilds_a_clip_that_changes_only_where_rows_were_kept():
    still = torch.randn(6, 4)
    clip = still.repeat(5, 1, 1)
    clip[2:, 1] = torch.randn(4)
    packed = compress(clip[None], budget=7)
    assert torch.equal(packed.unmerge(fill="hold"), clip.flatten(0, 1))


def test_unmerge_takes_other_values_and_gradients():
    _, packed = packed_by()
    other = torch.randn(packed.index.shape[0], 2, 3, dtype=torch.float64, requires_grad=True)
    spread = packed.unmerge(other)
    assert spread.shape == (packed.layout.total, 2, 3)
    spread.sum().backward()
    assert torch.equal(other.grad, torch.ones_like(other))
    with pytest.raises(ValueError, match=r"expected values with 21 rows, got \(3, 2\)"):
        packed.unmerge(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="expected fill 'zero' or 'hold', got 'next'"):
        packed.unmerge(fill="next")


def test_merged_rows():
    layout = Layout.from_grid([(2, 1, 3), (1, 1, 2)])
    tokens = torch.randn(8, 4)
    packed = merged_by(torch.tensor([0, 1, -1, 0, 1, 1, 2, 2]), layout, tokens)
    assert packed.weight.tolist() == [2, 3, 2]
    assert packed.index.tolist() == [0, 1, 6]
    assert packed.cu_seqlens.tolist() == [0, 2, 3]
    assert packed.mask.tolist() == [True, True, False, False, False, False, True, False]
    assert torch.equal(packed.reduce(tokens), packed.values)
    assert torch.equal(packed.reduce(tokens.reshape(8, 2, 2)), packed.values.reshape(3, 2, 2))
    assert torch.equal(packed.unmerge()[[3, 4, 5, 7]], packed.values[[0, 1, 1, 2]])
    assert not packed.unmerge()[2].any()


@pytest.mark.parametrize("weighted", [False, True])
def test_positions_by_a_rule(weighted):
    """Three rows join one that stands in the middle, one stays alone, one row after the grid, one is dropped."""
    layout = Layout.from_grid([(5, 1, 1)], extra_rows=1)
    sizes = torch.tensor([1.0, 5.0, 1.0, 1.0, 1.0, 1.0]) if weighted else None
    assignment, index = torch.tensor([0, 0, 1, 0, -1, 2]), torch.tensor([1, 2, 5])
    packed = Packed(torch.zeros(3, 1), index, torch.tensor([0, 3]), layout, assignment=assignment, sizes=sizes)
    time = {rule: packed.positions_by(rule)[:, 0].tolist() for rule in ("centre", "first", "mean")}
    # (0 + 1 + 3) / 3 = 1.33 and (0 + 5·1 + 3) / 7 = 1.14
    assert time == {"centre": [1, 2, 5], "first": [0, 2, 5], "mean": [1, 2, 5]}
    assert torch.equal(packed.positions_by("centre"), packed.positions)
    assert packed.mrope_positions(rule="first")[0].tolist() == [0, 2, 5]
    with pytest.raises(ValueError, match="expected rule 'centre', 'first' or 'mean', got 'middle'"):
        packed.positions_by("middle")


def test_mean_positions_are_rounded_half_to_even_and_weighted():
    tokens = torch.randn(1, 4, 6, 3)
    runs = compress(tokens, budget=6, method="temporal_merge")
    assert runs.positions_by("mean")[:, 0].tolist() == [2] * 6  # 1.5 each
    first = compress(
        tokens, budget=6, method="temporal_merge", weights=torch.tensor([4.0] + [1.0] * 3).repeat_interleave(6)
    )
    assert first.positions_by("mean")[:, 0].tolist() == [1] * 6  # 6 / 7
    assert torch.equal(first.positions_by("mean")[:, 1:], first.positions[:, 1:])


def test_positions_by_a_rule_of_nothing():
    _, packed = packed_by(grids=[], budget=1)
    assert [packed.positions_by(rule).shape for rule in ("centre", "first", "mean")] == [(0, 3)] * 3


def test_reduce_without_merging_is_take():
    tokens, packed = packed_by()
    assert packed.weight is not None
    assert torch.equal(packed.reduce(tokens), packed.take(tokens))


@settings(deadline=None, max_examples=40)
@given(ragged, st.integers(1, 12), st.integers(0, 2))
def test_frame_counts(grids, budget, extra):
    _, packed = packed_by(grids, extra, budget)
    want, start = [], 0
    kept = set(packed.index.tolist())
    for t, h, w in grids:
        want += [sum(start + f * h * w + site in kept for site in range(h * w)) for f in range(t)]
        start += t * h * w + extra
    assert packed.frame_counts.tolist() == want
    if not extra:
        assert packed.frame_cu_seqlens.diff().tolist() == want


def test_frame_cu_seqlens_wants_every_row_in_a_frame():
    _, packed = packed_by(extra=1)
    with pytest.raises(ValueError, match="expected a layout without extra rows, got 1 per video"):
        _ = packed.frame_cu_seqlens


def test_mrope_positions_are_exact_integers_where_16_bit_floats_are_not():
    layout = Layout.from_grid([(2600, 2, 3), (40, 1, 2)])
    index = torch.tensor([257 * 6 + 5, 2049 * 6 + 1, 2599 * 6 + 4, 2600 * 6 + 39 * 2 + 1, -1])
    packed = Packed(torch.zeros(5, 1), index, torch.tensor([0, 3, 4]), layout)
    assert packed.mrope_positions().T.tolist() == [[257, 1, 2], [2049, 0, 1], [2599, 1, 1], [39, 0, 1], [-1, -1, -1]]
    begin = torch.tensor([10, 5000])
    later = packed.mrope_positions(start=begin, time_scale=2)
    assert later.T.tolist() == [[524, 11, 12], [4108, 10, 11], [5208, 11, 11], [5078, 5000, 5001], [-1, -1, -1]]
    assert packed.mrope_positions(start=7, renumber=True).T.tolist() == [[7] * 3, [8] * 3, [9] * 3, [7] * 3, [-1] * 3]


@pytest.mark.parametrize("scale, frames", [(0.5, [0, 0, 1, 1]), (Fraction(4, 3), [0, 1, 2, 4]), (0.7, [0, 0, 1, 2])])
def test_mrope_time_is_rounded_down(scale, frames):
    packed = compress(torch.randn(1, 4, 1, 3), budget="100%", method="uniform")
    assert packed.mrope_positions(time_scale=scale)[0].tolist() == frames
    with pytest.raises(ValueError, match="expected time_scale of at least 0, got -1"):
        packed.mrope_positions(time_scale=-1)


def test_mrope_positions_of_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    packed = Packed(torch.zeros(0, 1), nothing, torch.zeros(1, dtype=torch.int64), Layout.from_grid([]))
    assert packed.mrope_positions().shape == (3, 0)


@pytest.mark.parametrize("extra", [0, 1])
def test_padded(extra):
    _, packed = packed_by(extra=extra, budget="40%")
    values, mask = packed.padded()
    counts = packed.cu_seqlens.diff()
    assert values.shape == (4, int(counts.max()), 5)
    assert torch.equal(mask.sum(1), counts)
    assert torch.equal(values[mask], packed.values)
    assert not values[~mask].any()


def test_trim():
    packed = compress(torch.randn(2, 2, 3, 4), threshold=0.0, scores=torch.tensor([1.0, -1, 1, -1, -1, 1] * 2))
    trimmed = packed.trim()
    assert trimmed.index.tolist() == [0, 2, 5, 6, 8, 11]
    assert torch.equal(trimmed.values, packed.values[:6])
    assert torch.equal(trimmed.positions, packed.positions[:6])
    assert torch.equal(trimmed.padded()[0], packed.padded()[0][:, :3])
    assert torch.equal(trimmed.unmerge(), packed.unmerge())
    empty = compress(torch.randn(2, 2, 3, 4), threshold=9.0, scores=torch.zeros(12)).trim()
    assert empty.values.shape == (0, 4)


@pytest.mark.parametrize("kind", ["selected", "threshold", "merged", "first of runs", "searched", "bfloat16", "empty"])
def test_save_and_load(kind, tmp_path):
    path = tmp_path / "kept.safetensors"
    tokens, packed = packed_by(extra=1)
    if kind == "threshold":
        packed = compress(tokens, packed.layout, threshold=0.9)
    elif kind == "merged":
        layout = Layout.from_grid([(2, 1, 3), (1, 1, 2)])
        packed = merged_by(torch.tensor([0, 1, -1, 0, 1, 1, 2, 2]), layout, torch.randn(8, 4))
    elif kind == "first of runs":
        sizes = torch.arange(float(packed.layout.total))
        packed = compress(tokens, packed.layout, budget=3, method="dtd", weights=sizes)
    elif kind == "searched":
        packed = gate_patches(torch.randint(0, 256, (2, 3, 1, 8, 8), dtype=torch.uint8), patch=4, budget=6, search=2)
    elif kind == "bfloat16":
        packed = compress(tokens.bfloat16(), packed.layout, budget=3)
    elif kind == "empty":
        packed = compress(torch.randn(0, 3, 4, 2), budget=3)
    packed.save(path)
    again = Packed.load(path)
    for name in (*_file.TENSORS, *_file.OPTIONAL):
        a, b = getattr(packed, name), getattr(again, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    assert (again.layout.grids, again.layout.extra_rows) == (packed.layout.grids, packed.layout.extra_rows)
    assert again.is_merged == packed.is_merged
    assert torch.equal(again.padded()[0], packed.padded()[0]) or kind == "threshold"


def test_save_overwrites_only_when_asked(tmp_path):
    path = tmp_path / "kept.safetensors"
    _, packed = packed_by()
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        packed.save(path)
    assert path.read_text() == "mine"
    packed.save(path, overwrite=True)
    assert torch.equal(Packed.load(path).values, packed.values)


def write(path, change):
    """A saved Packed, changed by ``change(tensors, layout metadata)``."""
    _, packed = packed_by(extra=1)
    packed.save(path, overwrite=True)
    tensors = load_file(path)
    head = {"grids": packed.layout.grids, "extra_rows": 1, "merged": False}
    metadata = {"format": "vtok.Packed 1", "layout": head}
    change(tensors, metadata)
    if not isinstance(metadata["layout"], str):
        metadata["layout"] = json.dumps(metadata["layout"])
    save_file(tensors, path, metadata)


def put(name, at, value):
    return lambda tensors, _: tensors[name].__setitem__(at, value)


def head(**values):
    return lambda _, metadata: metadata["layout"].update(values)


@pytest.mark.parametrize(
    "change, text",
    [
        (put("index", 0, -1), r"expected index in \[0, 67\), then -1"),
        (put("index", -1, 67), r"expected index in \[0, 67\)"),
        (put("index", 0, 2**62), r"expected index in \[0, 67\)"),
        (put("index", 1, 0), "expected index ascending"),
        (put("cu_seqlens", 0, 1), "expected cu_seqlens ascending from 0"),
        (put("cu_seqlens", -1, 10**9), "expected cu_seqlens ascending from 0 to at most 25"),
        (put("cu_seqlens", 1, 3), "expected index ascending, each video's rows in its own part"),
        (put("assignment", 0, 25), r"expected assignment in \[-1, 25\)"),
        (lambda t, _: t.pop("values"), "expected the tensors .* got none of values"),
        (lambda t, _: t.update(values=t["values"][1:].clone()), r"expected values of shape \(25, 5\)"),
        (lambda t, _: t.update(values=t["values"][0].clone()), r"expected values \[K, D\]"),
        (lambda t, _: t.update(index=t["index"].int()), "expected index of dtype torch.int64, got torch.int32"),
        (lambda t, _: t.update(scores=t["scores"][:3].clone()), r"expected scores of shape \(67,\), got \(3,\)"),
        (lambda t, _: t.update(cu_seqlens=t["cu_seqlens"][:0].clone()), r"expected cu_seqlens of shape \(5,\)"),
        (lambda _, m: m.update(format="other"), "expected format 'vtok.Packed 1', got 'other'"),
        (lambda _, m: m.update(layout="{"), "expected a layout of host integers"),
        (lambda _, m: m.update(layout="[" * 100000), "expected a layout of host integers"),
        (lambda _, m: m.update(layout="[]"), "expected a layout of host integers"),
        (head(grids="abc"), "expected a layout of host integers"),
        (head(grids=[[1, 2]]), "expected a layout of host integers"),
        (head(grids=[[1, 2, "3"]]), "expected a layout of host integers"),
        (head(grids=[[2**40, 2**40, 2**40]] * 4), "expected a layout of host integers"),
        (head(grids=[[2**20, 2**20, 2**20]] * 4), "expected a.* of shape"),
        (head(extra_rows=-1), "expected a layout of host integers"),
        (head(merged="yes"), "expected a layout of host integers"),
        (head(as_released=1), "expected a layout of host integers"),
    ],
)
def test_a_hostile_file_is_refused(change, text, tmp_path):
    path = tmp_path / "bad.safetensors"
    write(path, change)
    with pytest.raises(ValueError, match=text):
        Packed.load(path)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}"])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        Packed.load(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    packed_by()[1].save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="expected a safetensors file"):
        Packed.load(path)
