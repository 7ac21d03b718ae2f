"""Layout: rows, frames and positions of ragged and dense batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils import _pytree

from vtok import Layout

RAGGED = [(3, 2, 4), (0, 2, 2), (1, 4, 4), (5, 2, 6)]


def brute(grids, extra):
    """(video, t, h, w) of every row, one at a time."""
    rows = []
    for video, (t, h, w) in enumerate(grids):
        rows += [(video, a, b, c) for a in range(t) for b in range(h) for c in range(w)]
        rows += [(video, t + i // max(h * w, 1), *divmod(i % max(h * w, 1), max(w, 1))) for i in range(extra)]
    return rows


@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize(
    "grids", [RAGGED, [(1, 1, 1)], [], [(2, 3, 5)] * 3, [(2, 1, 3), (3, 0, 2), (2, 3, 0)]], ids=str
)
def test_rows_videos_and_positions(grids, extra):
    layout = Layout.from_grid(grids, extra_rows=extra)
    want = brute(grids, extra)
    rows = torch.arange(layout.total)
    assert (layout.total, layout.videos, layout.frames) == (len(want), len(grids), sum(g[0] for g in grids))
    assert layout.video_of(rows).tolist() == [row[0] for row in want]
    assert layout.positions(rows).tolist() == [list(row[1:]) for row in want]
    assert layout.cu_seqlens.dtype == layout.tokens_per_frame.dtype == torch.int64
    assert layout.grids == grids
    in_grid = [row[1] < grids[row[0]][0] for row in want]
    assert layout.extra_mask().tolist() == [not inside for inside in in_grid]
    if grids:
        before = np.cumsum([0] + [t for t, _, _ in grids])
        frames = [before[v] + t if inside else before[-1] for (v, t, _, _), inside in zip(want, in_grid, strict=True)]
        assert layout.frame_of(rows).tolist() == frames
        assert (layout.columns()[2][layout.extra_mask()] == 1).all()


def test_frame_starts():
    layout = Layout.from_grid([(2, 1, 3), (0, 2, 2), (2, 0, 3), (1, 2, 2)], extra_rows=1)
    first, sites = layout.frame_starts()
    assert first.tolist() == [0, 3, 8, 8, 9]
    assert sites.tolist() == [3, 3, 0, 0, 4]


def test_merge_size_divides_height_and_width():
    assert Layout.from_grid([(4, 12, 20)], merge_size=2).grids == [(4, 6, 10)]
    with pytest.raises(ValueError, match=r"expected h and w divisible by merge_size=2, got the grid \(4, 5, 20\)"):
        Layout.from_grid([(4, 5, 20)], merge_size=2)


def test_uniform_is_from_grid():
    dense, ragged = Layout.uniform(3, 4, 2, 5), Layout.from_grid([(4, 2, 5)] * 3)
    assert (dense.total, dense.frames, dense.grids) == (ragged.total, ragged.frames, ragged.grids)
    for name in ("cu_seqlens", "cu_frames", "tokens_per_frame", "width"):
        assert torch.equal(getattr(dense, name), getattr(ragged, name))


def test_positions_stay_exact_where_activations_would_not():
    """bfloat16 loses integers above 256, float16 above 2048, float32 above 2**24: positions are int64."""
    layout = Layout.from_grid([(3001, 1, 2), (2, 40000, 60000)])
    t, _, w = layout.positions(torch.tensor([2 * 257, 2 * 2049 + 1, 6001])).unbind(1)
    assert t.tolist() == [257, 2049, 3000]
    assert w.tolist() == [0, 1, 1]
    far = 6002 + 2 * 40000 * 60000 - 1  # beyond 2**31 and 2**32 rows
    assert layout.positions(torch.tensor([far])).tolist() == [[1, 39999, 59999]]


def test_padding_has_position_minus_one():
    assert Layout.from_grid([(2, 2, 2)]).positions(torch.tensor([3, -1])).tolist() == [[0, 1, 1], [-1, -1, -1]]
    assert Layout.from_grid([]).positions(torch.tensor([-1])).tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize(
    "grid", [[[2, 3, 4]], ((2, 3, 4),), torch.tensor([[2, 3, 4]]), np.array([[2, 3, 4]], np.int32)], ids=type
)
def test_grids_of_any_host_kind(grid):
    assert Layout.from_grid(grid).grids == [(2, 3, 4)]


def test_a_grid_on_the_device_is_refused_not_read():
    with pytest.raises(ValueError, match=r"expected grid_thw on the host .* got a tensor on meta"):
        Layout.from_grid(torch.ones(1, 3, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    "grid, kwargs, error, text",
    [
        ([[2, 3]], {}, ValueError, r"expected grid_thw of shape \(V, 3\), got a grid of 2 numbers"),
        ([2, 3, 4], {}, TypeError, r"expected grid_thw as integers of shape \(V, 3\)"),
        ([[2, 3, 4.0]], {}, TypeError, r"expected grid_thw as integers of shape \(V, 3\)"),
        ([[2, -3, 4]], {}, ValueError, "expected grid_thw of at least 0, got -3"),
        (torch.ones(1, 3), {}, TypeError, "expected grid_thw of integers, got torch.float32"),
        ([[2, 3, 4]], {"merge_size": 0}, ValueError, "expected merge_size of at least 1, got 0"),
        ([[2, 3, 4]], {"extra_rows": -1}, ValueError, "expected extra_rows of at least 0, got -1"),
        ([[2, 3, 4]], {"extra_rows": True}, TypeError, "expected extra_rows as an integer, got True"),
    ],
)
def test_errors(grid, kwargs, error, text):
    with pytest.raises(error, match=text):
        Layout.from_grid(grid, **kwargs)


def test_is_a_pytree():
    layout = Layout.from_grid(RAGGED, extra_rows=1)
    again = _pytree.tree_map(lambda leaf: leaf, layout)
    assert again is not layout
    assert (again.total, again.grids) == (layout.total, layout.grids)


def test_compiled_code_serves_every_layout():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda layout, index: (layout.positions(index), *layout.frame_starts(), layout.extra_mask()),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for grids, picked in ((RAGGED, 7), ([(2, 3, 4), (7, 1, 1)], 5), ([(2, 2, 2)] * 9, 30)):
            layout = Layout.from_grid(grids, extra_rows=2)
            index = torch.randint(layout.total, (picked,))
            assert torch.equal(compiled(layout, index)[0], layout.positions(index))
            assert torch.equal(compiled(layout, index)[1], layout.frame_starts()[0])
