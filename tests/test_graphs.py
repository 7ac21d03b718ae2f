"""compress in a graph: whole, without a recompile, and without a value on the host."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from vtok import Compressor, Layout, Plan, compress


def ragged_calls(extra=0):
    for grids in (
        [(3, 2, 4), (2, 2, 2)],
        [(4, 4, 4), (5, 2, 6), (3, 2, 2)],
        [(2, 2, 3), (3, 4, 4), (6, 3, 3), (2, 5, 4)],
    ):
        layout = Layout.from_grid(grids, extra_rows=extra)
        yield torch.randn(layout.total, 77), layout


third = Fraction(1, 3)
COMPILED = {
    "rows": (
        lambda x, g, k: compress(x, g, budget=k),
        [(*a, k) for a, k in zip(ragged_calls(), (5, 7, 4), strict=True)],
    ),
    "float": (lambda x, g: compress(x, g, budget=0.1), list(ragged_calls())),
    "percent, extra rows": (lambda x, g: compress(x, g, budget="25%"), list(ragged_calls(2))),
    "fraction": (lambda x, g: compress(x, g, budget=third, method="random"), list(ragged_calls())),
    "whole batch": (
        lambda x, g, k: compress(x, g, total_budget=k, method="uniform"),
        [(*a, k) for a, k in zip(ragged_calls(), (9, 17, 34), strict=True)],
    ),
    "plan with a floor": (
        lambda x, g, plan: compress(x, g, budget=plan),
        [
            (x, g, Plan.of(g, budget=b, min_per_frame=1))
            for (x, g), b in zip(ragged_calls(1), ("50%", 9, 12), strict=True)
        ],
    ),
    "threshold": (
        lambda x, g, c: compress(x, g, threshold=0.9, capacity=c),
        [(*a, c) for a, c in zip(ragged_calls(1), (9, 12, 13), strict=True)],
    ),
    "dense": (
        lambda x, k: compress(x, budget=k),
        [(torch.randn(b, t, n, 77), k) for b, t, n, k in ((2, 3, 4, 5), (3, 5, 6, 7), (4, 2, 9, 11))],
    ),
    "dense grid, share": (
        lambda x: compress(x, budget=0.3),
        [(torch.randn(b, t, n, n + 1, 77),) for b, t, n in ((2, 3, 4), (3, 5, 6), (4, 2, 9))],
    ),
    "module": (Compressor(budget=9), list(ragged_calls(1))),
}


def same(a, b):
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("values", "index", "cu_seqlens", "positions", "assignment")]
    return all(torch.equal(x, y) for x, y in [*pairs, *zip(a.padded(), b.padded(), strict=True)])


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole_without_recompiling(name):
    call, inputs = COMPILED[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for args in inputs:
            assert same(compiled(*args), call(*args))


def test_a_graph_says_what_it_cannot_take():
    layout = Layout.from_grid([(3, 2, 4), (2, 2, 2)])
    for kwargs in ({"budget": [3, 4]}, {"budget": 4, "min_per_frame": 1}, {"threshold": 0.1, "min_per_frame": 1}):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, g, kw=kwargs: compress(x, g, **kw), backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="Plan"):
            compiled(torch.randn(layout.total, 4), layout)


def test_never_reads_a_value_on_the_host():
    """Under fake tensors there are no values: anything that would wait for the device raises."""
    with torch._subclasses.FakeTensorMode():
        tokens = torch.randn(2, 3, 4, 8)
        layout = Layout.uniform(2, 3, 2, 2)
        for kwargs in ({"budget": 5}, {"total_budget": "40%"}, {"budget": [[1, 2, 3], 6]}, {"threshold": 0.5},
                       {"budget": 6, "min_per_frame": 1}, {"budget": 5, "method": "uniform"},
                       {"budget": 5, "method": "random"}):  # fmt: skip
            packed = compress(tokens, layout, **kwargs)
            packed.take(tokens.flatten(0, 2)), packed.unmerge(fill="hold"), packed.padded(), packed.frame_cu_seqlens
            assert (packed.mask.shape, packed.positions.shape) == ((24,), (packed.index.shape[0], 3))
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            packed.trim()
