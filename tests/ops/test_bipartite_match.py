"""bipartite_match: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok.ops._rooms import ROOMS

from alike import RAGGED, bounds, planted, whole_numbers
from rooms import FLOATS, Case, Error, from_numpy, outputs, poisoned, randn, same_bits, to_numpy

match = vtok.ops.bipartite_match


def cases() -> list[Case]:
    return [
        *(Case(f"ragged-{D}-{str(t)[6:]}", (randn((67, D), t, "m"), RAGGED)) for D in (1, 77) for t in FLOATS),
        Case("float64", (randn((67, 33), torch.float64, "m"), RAGGED), {"split": 3}),
        Case("513", (randn((67, 513), torch.bfloat16, "m"), RAGGED), {"protected": 1}),
        Case("several-tiles", (randn((300, 40), torch.float16, "m"), bounds(290, 9))),
        Case("exact-planted", (planted(), RAGGED)),
        Case("exact-ties", (whole_numbers(300, 3), bounds(150, 150)), {"split": 4}),
        Case("exact-protected", (whole_numbers(67, 5), RAGGED), {"protected": 3}),
        Case("exact-long", (whole_numbers(40, 600), bounds(17, 20)), {"split": 5, "protected": 2}),
        Case("exact-static", (whole_numbers(1, 9).repeat(140, 1), bounds(140))),
        Case("exact-eps", (whole_numbers(67, 4), RAGGED), {"eps": 8.0}),
        Case("exact-no-destination", (whole_numbers(9, 4), bounds(5, 4)), {"split": 2**40}),
        Case("exact-all-protected", (whole_numbers(9, 4), bounds(5, 4)), {"protected": 2**40}),
        Case("exact-no-segments", (whole_numbers(3, 8), bounds())),
        Case("exact-no-rows", (torch.empty(0, 8), bounds(0, 0))),
        Case("exact-no-columns", (torch.empty(6, 0), bounds(6))),
    ]


def errors() -> list[Error]:
    x, cu = torch.randn(15, 7), bounds(6, 9)
    op = "vtok::bipartite_match: expected "
    return [
        Error(f"{op}rows of shape (S, D), got (7,)", (x[0], cu)),
        Error(f"{op}rows of dtype float32, float16, bfloat16 or float64, got int64", (x.long(), cu)),
        Error(f"{op}cu_seqlens of shape (V+1,), got (1, 3)", (x, cu[None])),
        Error(f"{op}cu_seqlens of dtype int64, got int32", (x, cu.int())),
        Error(f"{op}cu_seqlens of shape (V+1,), got (0,)", (x, cu[:0])),
        Error(f"{op}split >= 2, got 1", (x, cu), {"split": 1}),
        Error(f"{op}protected >= 0, got -1", (x, cu), {"protected": -1}),
        Error(f"{op}eps finite and >= 0, got -1", (x, cu), {"eps": -1.0}),
        Error(f"{op}eps finite and >= 0, got nan", (x, cu), {"eps": math.nan}),
        Error(
            f"{op}cu_seqlens ascending from 0 to at most S=15, got cu_seqlens[1]=16",
            (x, torch.tensor([0, 16])),
            only_cpu=True,
        ),
        Error(
            f"{op}cu_seqlens ascending from 0 to at most S=15, got cu_seqlens[2]=5",
            (x, torch.tensor([0, 6, 5])),
            only_cpu=True,
        ),
    ]


def host(kernels, rows, cu_seqlens, *, split=2, protected=0, eps=1e-8):
    best, target = poisoned(rows.shape[:1], torch.float32), poisoned(rows.shape[:1], torch.int64)
    if rows.shape[0]:
        getattr(kernels, f"bipartite_match_{str(rows.dtype)[6:]}")(
            to_numpy(rows), rows.shape[0], rows.shape[1], rows.shape[1], to_numpy(cu_seqlens),
            cu_seqlens.shape[0] - 1, split, protected, eps, best, target,
        )  # fmt: skip
    return from_numpy(best), from_numpy(target)


def compare(got: tuple[torch.Tensor, ...], case: Case) -> None:
    """Bit for bit where sums are exact; else each choice is, in float64, within tolerance of the best one."""
    assert len(got) == 2
    if case.name.startswith("exact"):
        for a, b in zip(got, outputs(ROOMS["bipartite_match"].reference(*case.args, **case.kwargs)), strict=True):
            assert same_bits(a, b), f"{case}:\n{a}\nexpected\n{b}"
    replay(got, *case.args, **case.kwargs)


def replay(got, rows, cu_seqlens, *, split=2, protected=0, eps=1e-8) -> None:
    best, target = got
    assert (best.dtype, target.dtype) == (torch.float32, torch.int64)
    assert best.shape == target.shape == rows.shape[:1]
    x, tolerance = rows.double(), (rows.shape[1] + 8) * 2**-23
    edges = cu_seqlens.tolist()
    idle = set(range(rows.shape[0]))
    for begin, end in pairwise(edges):
        members = range(begin + min(protected, end - begin), end)
        receivers = [s for s in members if (s - begin) % split == split - 1]
        for s in sorted(set(members) - set(receivers)):
            idle.remove(s)
            if not receivers:
                assert (best[s], target[s]) == (-math.inf, -1)
                continue
            norm = (x[s].square().sum() * x[receivers].square().sum(-1)).sqrt().clamp(min=eps)
            alike = dict(zip(receivers, ((x[receivers] * x[s]).sum(-1) / norm).tolist(), strict=True))
            real = [c for c in alike.values() if not math.isnan(c)]
            assert int(target[s]) in alike
            if not real:
                assert math.isnan(best[s]) and target[s] == receivers[0]
                continue
            assert alike[int(target[s])] >= max(real) - tolerance
            assert abs(float(best[s]) - alike[int(target[s])]) <= tolerance
    for s in idle:
        assert (best[s], target[s]) == (-math.inf, s)


def by_the_rule(x: list[list[int]], split: int, protected: int) -> list[int]:
    """The targets of one segment of integers, in exact arithmetic: cosines compare as their signed squares do."""

    def alike(a, b):
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        norms = sum(p * p for p in a) * sum(q * q for q in b)
        return Fraction(dot * abs(dot), norms) if norms else Fraction(0)

    receivers = [i for i in range(protected, len(x)) if i % split == split - 1]
    looking = [i for i in range(protected, len(x)) if i % split != split - 1]
    return [max(receivers, key=lambda j: alike(x[i], x[j])) if i in looking and receivers else
            -1 if i in looking else i for i in range(len(x))]  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 3).flatmap(
        lambda D: st.lists(st.lists(st.integers(-2, 2), min_size=D, max_size=D), min_size=1, max_size=20)
    ),
    st.integers(2, 5),
    st.integers(0, 4),
)
def test_the_rule(x, split, protected):
    rows = torch.tensor(x, dtype=torch.float32).reshape(len(x), -1)
    _, target = match(rows, bounds(len(x)), split=split, protected=protected)
    norms = rows.square().sum(-1)
    for i, want in enumerate(by_the_rule(x, split, protected)):
        j = int(target[i])
        if want in (-1, i):
            assert j == want
        else:  # 2/√(4·1) and 4/√(4·4) are equal, but others may differ by less than float32 can say
            a, b = (rows[i].double() @ rows[k].double() / max((norms[i] * norms[k]).double().sqrt(), 1e-8)
                    for k in (j, want))  # fmt: skip
            assert j == want or abs(a - b) < 1e-7


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 90), max_size=4), st.integers(1, 40), st.integers(2, 4), st.integers(0, 3))
def test_any_layout(host_kernels, lengths, D, split, protected):
    """The rule holds, equal rows tie exactly, and a segment matches the same alone as in the batch."""
    cu, kw = bounds(*lengths), {"split": split, "protected": protected}
    x = randn((int(cu[-1]), D), torch.bfloat16, "any", *lengths)
    x = x[torch.randint(0, x.shape[0] or 1, (x.shape[0] + 3,))] if x.shape[0] else x  # rows that repeat
    for run in (match, lambda *args, **kw: host(host_kernels, *args, **kw)):
        got = run(x, cu, **kw)
        replay(got, x, cu, **kw)
        for v in range(len(lengths)):
            part = slice(int(cu[v]), int(cu[v + 1]))
            best, target = run(x[part], bounds(lengths[v]), **kw)
            assert same_bits(best, got[0][part])
            assert torch.equal(torch.where(target < 0, -1, target + cu[v]), got[1][part])
            for s in range(part.start, part.stop):
                first = int((x[part] == x[got[1][s]]).all(-1).byte().argmax()) + part.start
                own = (first - part.start) % split == split - 1 and first - part.start >= protected
                assert got[1][s] == s or not own or got[1][s] == first


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("D", [2, 77, 700])
def test_identical_rows_give_exactly_one(host_kernels, D, dtype):
    x = randn((7, D), dtype, "identical").repeat_interleave(2, 0)
    for best, target in (match(x, bounds(14)), host(host_kernels, x, bounds(14))):
        assert best[::2].tolist() == [1.0] * 7
        assert target[::2].tolist() == list(range(1, 14, 2))


def test_many_tiles_on_both_sides(host_kernels):
    """Blocks share the destinations of one source; the winner is the same whoever comes first."""
    x = whole_numbers(900, 2)
    want = ROOMS["bipartite_match"].reference(x, bounds(900))
    for got in (match(x, bounds(900)), host(host_kernels, x, bounds(900))):
        assert all(map(same_bits, got, want))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    x, cu = randn((700, 90), torch.float32, "threads"), bounds(600, 3, 97)
    want, before = match(x, cu), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(same_bits, match(x, cu), want))
    finally:
        torch.set_num_threads(before)


BAD = st.sampled_from([-(2**63), -7, -1, 0, 1, 5, 30, 40, 41, 2**63 - 1])


@settings(deadline=None, max_examples=40)
@given(st.lists(BAD, min_size=1, max_size=5), st.integers(2, 3), st.integers(0, 2))
def test_no_boundaries_lead_outside_a_tensor(host_kernels, cu, split, protected):
    """CUDA cannot look at the values without a sync: whatever they are, only rows of the tensors are touched."""
    best, target = np.full(42, 7, np.float32), np.full(42, 7, np.int64)
    host_kernels.bipartite_match_float32(
        to_numpy(randn((40, 6), torch.float32)), 40, 6, 6, np.array(cu, np.int64), len(cu) - 1, split, protected,
        1e-8, best[1:-1], target[1:-1],
    )  # fmt: skip
    assert best[0] == best[-1] == target[0] == target[-1] == 7
    assert ((target[1:-1] >= -1) & (target[1:-1] < 40)).all()


def test_more_than_2_31_elements():
    """Row offsets are 64-bit: a strided view whose last row lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16))  # pages nobody touches take no memory
    rows = buffer.as_strided((3, 32), (2**30, 1))
    rows[:] = randn((3, 32), torch.float16, "far")
    assert all(map(same_bits, match(rows, bounds(3)), match(rows.clone(), bounds(3))))
