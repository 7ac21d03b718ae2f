"""density_cluster: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok.ops._rooms import ROOMS

from rooms import FLOATS, Case, Error, from_numpy, generator, outputs, poisoned, randn, same_bits, to_numpy

cluster = vtok.ops.density_cluster
GOLDEN = Path(__file__).parent.parent / "golden"


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


RAGGED, FEW = bounds(11, 0, 1, 2, 3, 40, 8), bounds(3, 2, 1, 0, 5, 6, 2)  # rows and centres; some rows are no group's


def whole_numbers(rows: int, D: int) -> torch.Tensor:
    """Small integers: every sum is exact, and many distances tie."""
    return torch.randint(-2, 3, (rows, D), generator=generator("whole", rows, D)).float()


def some(rows: int) -> torch.Tensor:
    return torch.rand(rows, generator=generator("some", rows)) < 0.6


def planted() -> torch.Tensor:
    """NaN, infinity, zeros, repeated and opposite rows, and distances without a finite square."""
    x = whole_numbers(67, 7)
    x[3, 2], x[5], x[17, 0] = math.nan, 0, math.inf
    x[9], x[20], x[22], x[23] = x[0], -x[21], 1e30, 2e19
    x[15], x[16] = x[14], -0.0 * x[14]
    x[57:65] = math.nan  # a group of nothing else
    return x


def cases() -> list[Case]:
    ragged = RAGGED, FEW, 19
    return [
        *(Case(f"ragged-{D}-{str(t)[6:]}", (randn((67, D), t, "m"), *ragged)) for D in (1, 77) for t in FLOATS),
        Case("float64", (randn((67, 33), torch.float64, "m"), *ragged), {"neighbours": 3}),
        Case("260", (randn((67, 260), torch.bfloat16, "m"), *ragged), {"valid": some(67)}),
        Case("several-tiles", (randn((160, 40), torch.float16, "m"), bounds(150, 9), bounds(70, 3), 73)),
        Case("exact-planted", (planted(), *ragged)),
        Case("exact-masked", (planted(), *ragged), {"valid": some(67)}),
        Case("exact-nobody", (whole_numbers(67, 3), *ragged), {"valid": torch.zeros(67, dtype=torch.bool)}),
        Case("exact-ties", (whole_numbers(140, 3), bounds(70, 70), bounds(66, 3), 69), {"neighbours": 64}),
        Case("exact-long", (whole_numbers(40, 300), bounds(17, 20), bounds(4, 2), 6), {"neighbours": 1}),
        Case("exact-static", (whole_numbers(1, 9).repeat(140, 1), bounds(140), bounds(5), 5)),
        Case("exact-cut-off", (whole_numbers(67, 4), RAGGED, FEW, 12)),
        Case("exact-room-left", (whole_numbers(67, 4), RAGGED, FEW, 25)),
        Case("exact-no-centres", (whole_numbers(9, 4), bounds(5, 4), bounds(0, 0), 0)),
        Case("exact-no-groups", (whole_numbers(3, 8), bounds(), bounds(), 2)),
        Case("exact-no-rows", (torch.empty(0, 8), bounds(0, 0), bounds(2, 1), 3)),
        Case("exact-no-columns", (torch.empty(6, 0), bounds(6), bounds(2), 2)),
    ]


def errors() -> list[Error]:
    x, cu, ck = torch.randn(15, 7), bounds(6, 9), bounds(2, 2)
    op = "vtok::density_cluster: expected "
    return [
        Error(f"{op}rows of shape (S, D), got (7,)", (x[0], cu, ck, 4)),
        Error(f"{op}rows of dtype float32, float16, bfloat16 or float64, got int64", (x.long(), cu, ck, 4)),
        Error(f"{op}cu_seqlens of shape (V+1,), got (1, 3)", (x, cu[None], ck, 4)),
        Error(f"{op}cu_seqlens of dtype int64, got int32", (x, cu.int(), ck, 4)),
        Error(f"{op}cu_seqlens of shape (V+1,), got (0,)", (x, cu[:0], ck, 4)),
        Error(f"{op}cu_k of dtype int64, got float32", (x, cu, ck.float(), 4)),
        Error(f"{op}cu_k of shape (V+1,)=(3,), got (2,)", (x, cu, ck[1:], 4)),
        Error(f"{op}k >= 0, got -1", (x, cu, ck, -1)),
        Error(f"{op}neighbours in [1, 64], got 0", (x, cu, ck, 4), {"neighbours": 0}),
        Error(f"{op}neighbours in [1, 64], got 65", (x, cu, ck, 4), {"neighbours": 65}),
        Error(f"{op}valid of shape (S,), got (15, 7)", (x, cu, ck, 4), {"valid": x > 0}),
        Error(f"{op}valid of shape (S,)=(15,), got (7,)", (x, cu, ck, 4), {"valid": x[0] > 0}),
        Error(f"{op}valid of dtype bool, got float32", (x, cu, ck, 4), {"valid": x[:, 0]}),
        Error(
            f"{op}cu_seqlens ascending from 0 to at most S=15, got cu_seqlens[2]=16",
            (x, torch.tensor([0, 6, 16]), ck, 4),
            only_cpu=True,
        ),
        Error(f"{op}cu_k ascending from 0, got cu_k[2]=1", (x, cu, torch.tensor([0, 2, 1]), 4), only_cpu=True),
    ]


def host(kernels, rows, cu_seqlens, cu_k, k, *, neighbours=7, valid=None):
    count, groups = rows.shape[0], cu_k.shape[0] - 1
    assignment, centres = poisoned((count,), torch.int64), poisoned((k,), torch.int64)
    score, workspace = (
        poisoned((count,), torch.float32),
        poisoned((12 * count + 4 * (count // 64 + groups),), torch.uint8),
    )
    if count or k:
        getattr(kernels, f"density_cluster_{str(rows.dtype)[6:]}")(
            to_numpy(rows), count, rows.shape[1], rows.shape[1], to_numpy(cu_seqlens), to_numpy(cu_k), groups, k,
            neighbours, None if valid is None else to_numpy(valid), assignment, centres, score, workspace,
        )  # fmt: skip
    return from_numpy(assignment), from_numpy(centres), from_numpy(score)


def compare(got: tuple[torch.Tensor, ...], case: Case) -> None:
    """Bit for bit where sums are exact; else float64 follows the choices, each of which must be about the best."""
    assert len(got) == 3
    if case.name.startswith("exact"):
        for a, b in zip(got, outputs(ROOMS["density_cluster"].reference(*case.args, **case.kwargs)), strict=True):
            assert same_bits(a, b), f"{case}:\n{a}\nexpected\n{b}"
    else:
        replay(got, *case.args, **case.kwargs)


def replay(got, rows, cu_seqlens, cu_k, k, *, neighbours=7, valid=None) -> None:
    """Of finite rows: scores, centres and assignment, each judged by what came before it."""
    assignment, centres, score = got
    assert (assignment.dtype, centres.dtype, score.dtype) == (torch.int64, torch.int64, torch.float32)
    assert (assignment.shape, centres.shape, score.shape) == (rows.shape[:1], (k,), rows.shape[:1])
    x, near = rows.float().double(), (rows.shape[1] + 16) * 2**-22  # of a squared distance, relative
    want = torch.full((k,), -1)
    idle = torch.ones(rows.shape[0], dtype=torch.bool)
    for v, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        members = torch.tensor([s for s in range(begin, end) if valid is None or valid[s]], dtype=torch.int64)
        idle[members] = False
        slots = range(min(int(cu_k[v]), k), min(int(cu_k[v + 1]), k))
        if not len(members):
            continue
        q = (x[members, None] - x[members]).square().mean(-1)
        mean = q.sort(-1).values[:, :neighbours].mean(-1)
        order = torch.arange(len(members))
        exact = mean[:, None] - mean  # who is denser may be either where float32 cannot say
        unsure = exact.abs() <= near * mean.maximum(mean[:, None])
        alike = (q == 0) & unsure
        surely = torch.where(unsure, False, exact > 0) | alike & (order < order[:, None])
        least = torch.where(surely, q, math.inf).amin(-1)
        lowest = torch.where(surely | unsure & ~alike & (order != order[:, None]), q, math.inf).amin(-1)
        most = q.amax()
        lo, hi = ((d.clamp(max=most)).log() / 2 - mean for d in (lowest, least))
        hi = torch.where(surely.any(-1), hi, most.log() / 2 - mean)
        slack = near * (1 + mean + lo.abs().nan_to_num(0, 0, 0))
        its = score[members].double()
        assert ((its >= lo - slack) & (its <= hi + slack)).all()
        best = its.neg().argsort(stable=True)[: int(cu_k[v + 1] - cu_k[v])].sort().values
        chosen = members[best][: len(slots)]
        want[slots.start : slots.start + len(chosen)] = chosen
        if not len(chosen):
            assert (assignment[members] == -1).all()
            continue
        place = assignment[members] - slots.start
        assert ((place >= 0) & (place < len(chosen))).all()
        assert torch.equal(centres[assignment[chosen]], chosen)
        to = (x[members, None] - x[chosen]).square().mean(-1)
        picked = to.gather(1, place[:, None])[:, 0]
        assert (picked <= to.amin(-1) * (1 + near)).all()
    assert torch.equal(centres, want)
    assert (assignment[idle] == -1).all() and (score[idle] == -math.inf).all()


def by_the_rule(x: list[list[int]], neighbours: int, k: int) -> tuple[list[int], list[Fraction], list[int]]:
    """(rows by density, squared distances to the nearest denser row, sums of the least squares) of integers."""
    q = [[sum((p - r) ** 2 for p, r in zip(a, b, strict=True)) for b in x] for a in x]
    sums = [sum(sorted(row)[:neighbours]) for row in q]
    order = sorted(range(len(x)), key=lambda i: (sums[i], i))
    delta = [0] * len(x)
    for rank, i in enumerate(order):
        delta[i] = min(q[i][j] for j in order[:rank]) if rank else max(map(max, q))
    return order, delta, sums


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3).flatmap(
        lambda D: st.lists(st.lists(st.integers(-2, 2), min_size=D, max_size=D), min_size=1, max_size=20)
    ),
    st.integers(1, 9),
    st.integers(1, 6),
)
def test_the_rule(x, neighbours, k):
    rows = torch.tensor(x, dtype=torch.float32)
    assignment, centres, score = cluster(rows, bounds(len(x)), bounds(k), k, neighbours=neighbours)
    order, delta, sums = by_the_rule(x, neighbours, k)
    values = min(neighbours, len(x)) * rows.shape[1]
    for i in range(len(x)):
        want = math.log(delta[i] / rows.shape[1]) / 2 - sums[i] / values if delta[i] else -math.inf
        assert score[i] == want or abs(float(score[i]) - want) <= 1e-6 * (1 + abs(want))
    best = sorted(range(len(x)), key=lambda i: (-float(score[i]), i))[:k]
    assert centres.tolist() == sorted(best) + [-1] * (k - len(best))
    assert order[0] in best  # the densest row has the largest score of all
    for i in range(len(x)):
        to = [float((rows[i] - rows[c]).square().sum()) for c in sorted(best)]
        assert assignment[i] == (sorted(best).index(i) if i in best else to.index(min(to)))


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 12)), max_size=4),
    st.integers(1, 40), st.integers(1, 12), st.booleans(),
)  # fmt: skip
def test_any_layout(host_kernels, groups, D, neighbours, masked):
    """The rule holds, equal rows tie exactly, and a group clusters the same alone as in the batch."""
    cu, ck = bounds(*(n for n, _ in groups)), bounds(*(c for _, c in groups))
    x = randn((int(cu[-1]), D), torch.bfloat16, "any", *groups)
    x = x[torch.randint(0, x.shape[0] or 1, (x.shape[0] + 3,))] if x.shape[0] else x  # rows that repeat
    valid = some(x.shape[0]) if masked else None
    for run in (cluster, lambda *args, **kw: host(host_kernels, *args, **kw)):
        got = run(x, cu, ck, int(ck[-1]), neighbours=neighbours, valid=valid)
        replay(got, x, cu, ck, int(ck[-1]), neighbours=neighbours, valid=valid)
        for v, (n, c) in enumerate(groups):
            part, slots = slice(int(cu[v]), int(cu[v + 1])), slice(int(ck[v]), int(ck[v + 1]))
            alone = run(
                x[part], bounds(n), bounds(c), c, neighbours=neighbours, valid=None if valid is None else valid[part]
            )
            assert same_bits(alone[2], got[2][part])
            assert torch.equal(torch.where(alone[0] < 0, -1, alone[0] + ck[v]), got[0][part])
            assert torch.equal(torch.where(alone[1] < 0, -1, alone[1] + cu[v]), got[1][slots])


def test_scores_keep_their_order_where_densities_vanish(host_kernels):
    """exp(-m) is 0 for every row here; which groups are dense still counts."""
    x = torch.tensor([[0.0], [1], [2], [2000], [2001], [2003], [5000]]) * 100
    for _, centres, score in (
        cluster(x, bounds(7), bounds(2), 2, neighbours=2),
        host(host_kernels, x, bounds(7), bounds(2), 2, neighbours=2),
    ):
        assert centres.tolist() == [0, 3]
        assert score.isfinite().all()


@pytest.mark.parametrize("case", json.loads((GOLDEN / "tokens" / "dpc_knn.json").read_text())["cases"], ids=str)
def test_against_the_originals(host_kernels, case):
    golden = np.load(GOLDEN / case["file"], allow_pickle=False)
    x, k, neighbours = torch.from_numpy(golden["in_x"]), case["params"]["clusters"], case["params"]["neighbours"]
    args = x, bounds(x.shape[0]), bounds(k), k
    for assignment, centres, score in (
        cluster(*args, neighbours=neighbours), host(host_kernels, *args, neighbours=neighbours)
    ):  # fmt: skip
        by_score = centres[score[centres].argsort(descending=True, stable=True)]
        assert by_score.tolist() == golden["out_centers"].tolist()
        assert centres[assignment].tolist() == golden["out_centers"][golden["out_assign"]].tolist()


def test_many_tiles_on_both_sides(host_kernels):
    x = whole_numbers(900, 2)
    args = x, bounds(900), bounds(130), 130
    want = ROOMS["density_cluster"].reference(*args)
    for got in (cluster(*args), host(host_kernels, *args)):
        assert all(map(same_bits, got, want))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    args = randn((700, 90), torch.float32, "threads"), bounds(600, 3, 97), bounds(40, 2, 9), 51
    want, before = cluster(*args), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(same_bits, cluster(*args), want))
    finally:
        torch.set_num_threads(before)


BAD = st.sampled_from([-(2**63), -7, -1, 0, 1, 5, 30, 64, 100, 101, 2**63 - 1])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(BAD, BAD), min_size=1, max_size=5), st.integers(1, 9))
def test_no_boundaries_lead_outside_a_tensor(host_kernels, boundaries, neighbours):
    """CUDA cannot look at the values without a sync: whatever they are, only rows of the tensors are touched."""
    groups = len(boundaries) - 1
    cu, ck = (np.array(b, np.int64) for b in zip(*boundaries, strict=True))
    assignment, centres, score = np.full(102, 7, np.int64), np.full(12, 7, np.int64), np.full(102, 7, np.float32)
    workspace = poisoned((12 * 100 + 4 * (100 // 64 + groups),), torch.uint8)
    host_kernels.density_cluster_float32(
        to_numpy(randn((100, 6), torch.float32)), 100, 6, 6, cu, ck, groups, 10, neighbours, None, assignment[1:-1],
        centres[1:-1], score[1:-1], workspace,
    )  # fmt: skip
    for out in (assignment, centres, score):
        assert out[0] == out[-1] == 7
    assert ((centres[1:-1] >= -1) & (centres[1:-1] < 100)).all()


def test_more_than_2_31_elements():
    """Row offsets are 64-bit: a strided view whose last row lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16))  # pages nobody touches take no memory
    rows = buffer.as_strided((3, 32), (2**30, 1))
    rows[:] = randn((3, 32), torch.float16, "far")
    args = bounds(3), bounds(2), 2
    assert all(map(same_bits, cluster(rows, *args), cluster(rows.clone(), *args)))
