"""similarity_components: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok.ops._rooms import ROOMS

from alike import RAGGED, bounds, planted, whole_numbers
from rooms import FLOATS, Case, Error, from_numpy, generator, outputs, poisoned, randn, same_bits, to_numpy

link = vtok.ops.similarity_components


def arcs(*lengths: int) -> torch.Tensor:
    """Each row like the next and unlike those further on: one long chain a group, its rows in any order."""
    angle = torch.cat([torch.randperm(rows, generator=generator("arc", rows)) * 0.01 for rows in lengths])
    return torch.stack([angle.cos(), angle.sin()], -1)


def case(name: str, rows: torch.Tensor, cu_seqlens: torch.Tensor, threshold: float, **kwargs) -> Case:
    return Case(name, (rows, cu_seqlens), {"threshold": threshold, **kwargs})  # which a graph takes as constants


def cases() -> list[Case]:
    return [
        *(case(f"ragged-{D}-{str(t)[6:]}", randn((67, D), t, "m"), RAGGED, 0.2) for D in (2, 77) for t in FLOATS),
        case("float64", randn((67, 33), torch.float64, "m"), RAGGED, 0.25),
        case("513", randn((67, 513), torch.bfloat16, "m"), RAGGED, 0.08, eps=1e-3),
        case("several-tiles", randn((300, 40), torch.float16, "m"), bounds(290, 9), 0.4),
        case("chain", arcs(200, 80), bounds(200, 80), 0.9999),
        case("exact-planted", planted(), RAGGED, 0.5),
        case("exact-strict", whole_numbers(67, 4), RAGGED, 0.5),
        case("exact-ties", whole_numbers(300, 6), bounds(150, 150), 0.8),
        case("exact-long", whole_numbers(40, 600), bounds(17, 20), 0.05),
        case("exact-static", whole_numbers(1, 9).repeat(140, 1), bounds(140), 0.999),
        case("exact-alone", whole_numbers(140, 9), bounds(140), 1.0),
        case("exact-all", whole_numbers(140, 9), bounds(70, 60), -2.0),
        case("exact-infinite", whole_numbers(9, 4), bounds(5, 4), -math.inf),
        case("exact-eps", whole_numbers(67, 4), RAGGED, 0.4, eps=8.0),
        case("exact-no-groups", whole_numbers(3, 8), bounds(), 0.5),
        case("exact-no-rows", torch.empty(0, 8), bounds(0, 0), 0.5),
        case("exact-no-columns", torch.empty(6, 0), bounds(6), 0.5),
    ]


def errors() -> list[Error]:
    x, cu = torch.randn(15, 7), bounds(6, 9)
    op = "vtok::similarity_components: expected "
    return [
        Error(f"{op}rows of shape (S, D), got (7,)", (x[0], cu, 0.5)),
        Error(f"{op}rows of dtype float32, float16, bfloat16 or float64, got int64", (x.long(), cu, 0.5)),
        Error(f"{op}cu_seqlens of shape (V+1,), got (1, 3)", (x, cu[None], 0.5)),
        Error(f"{op}cu_seqlens of dtype int64, got int32", (x, cu.int(), 0.5)),
        Error(f"{op}cu_seqlens of shape (V+1,), got (0,)", (x, cu[:0], 0.5)),
        Error(f"{op}threshold to be a number, got nan", (x, cu, math.nan)),
        Error(f"{op}eps finite and >= 0, got -1", (x, cu, 0.5), {"eps": -1.0}),
        Error(f"{op}eps finite and >= 0, got nan", (x, cu, 0.5), {"eps": math.nan}),
        Error(
            f"{op}cu_seqlens ascending from 0 to at most S=15, got cu_seqlens[1]=16",
            (x, torch.tensor([0, 16]), 0.5),
            only_cpu=True,
        ),
        Error(
            f"{op}cu_seqlens ascending from 0 to at most S=15, got cu_seqlens[2]=5",
            (x, torch.tensor([0, 6, 5]), 0.5),
            only_cpu=True,
        ),
    ]


def host(kernels, rows, cu_seqlens, threshold, *, eps=1e-8):
    label = poisoned(rows.shape[:1], torch.int64)
    if rows.shape[0]:
        getattr(kernels, f"similarity_components_{str(rows.dtype)[6:]}")(
            to_numpy(rows), rows.shape[0], rows.shape[1], rows.shape[1], to_numpy(cu_seqlens),
            cu_seqlens.shape[0] - 1, threshold, eps, label,
        )  # fmt: skip
    return from_numpy(label)


def compare(got: tuple[torch.Tensor, ...], case: Case) -> None:
    """Bit for bit where sums are exact; else between the components of what is surely linked and of what may be."""
    (label,) = got
    if case.name.startswith("exact"):
        (want,) = outputs(ROOMS["similarity_components"].reference(*case.args, **case.kwargs))
        assert same_bits(label, want), f"{case}:\n{label}\nexpected\n{want}"
    replay(label, *case.args, **case.kwargs)


def replay(label, rows, cu_seqlens, threshold, *, eps=1e-8) -> None:
    assert label.dtype == torch.int64 and label.shape == rows.shape[:1]
    x, tolerance, limit = rows.double(), (rows.shape[1] + 8) * 2**-23, float(np.float32(threshold))
    norm = x.square().sum(-1)
    for begin, end in pairwise(cu_seqlens.tolist()):
        part = slice(begin, end)
        alike = x[part] @ x[part].T / (norm[part, None] * norm[part]).sqrt().clamp(min=eps)
        sure, perhaps = alike > limit + tolerance, alike > limit - tolerance
        least, most = (vtok.ops.connected_components(*e.nonzero().T.contiguous(), end - begin) for e in (sure, perhaps))
        mine = label[part] - begin
        first = torch.arange(end - begin)
        assert bool((mine >= 0).all()) and bool((mine <= first).all()) and torch.equal(mine[mine], mine)
        assert torch.equal(mine, mine[least]), "surely linked, and apart"
        assert torch.equal(most, most[mine]), "surely apart, and together"
    assert bool((label[cu_seqlens[-1] :] == -1).all())


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 90), max_size=4), st.integers(1, 40), st.sampled_from([0.1, 0.5, 0.9, 1.0, -1.5]))
def test_any_layout(host_kernels, lengths, D, threshold):
    """The rule holds, equal rows go together, and a group is labelled the same alone as in the batch."""
    cu = bounds(*lengths)
    x = randn((int(cu[-1]), D), torch.bfloat16, "any", *lengths)
    x = x[torch.randint(0, x.shape[0] or 1, (x.shape[0] + 3,))] if x.shape[0] else x  # rows that repeat
    for run in (link, lambda *args: host(host_kernels, *args)):
        got = run(x, cu, threshold)
        replay(got, x, cu, threshold)
        for v in range(len(lengths)):
            part = slice(int(cu[v]), int(cu[v + 1]))
            assert torch.equal(run(x[part], bounds(lengths[v]), threshold) + cu[v], got[part])
            if threshold < 1 and lengths[v]:
                same = (x[part, None] == x[part]).all(-1).byte().argmax(-1)
                assert torch.equal(got[part], got[part][same])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("D", [2, 77, 700])
def test_identical_rows_are_linked_below_one_and_not_at_it(host_kernels, D, dtype):
    x = randn((7, D), dtype, "identical").repeat(2, 1)
    for run in (link, lambda *args: host(host_kernels, *args)):
        below, at = (run(x, bounds(14), threshold) for threshold in (1 - 2**-24, 1.0))
        assert torch.equal(below[7:], below[:7]) and at.tolist() == list(range(14))


@pytest.mark.parametrize("seed", range(3))
def test_many_tiles_join_one_component(host_kernels, seed):
    """Blocks join the rows of a long chain at the same time, in any order."""
    x, cu = arcs(400, 100), bounds(400, 100)
    host_kernels.seed(seed)
    for label in (link(x, cu, 0.9999), host(host_kernels, x, cu, 0.9999)):
        assert label.tolist() == [0] * 400 + [400] * 100


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    x, cu = randn((900, 90), torch.float32, "threads"), bounds(600, 3, 297)
    want, before = link(x, cu, 0.3), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(link(x, cu, 0.3), want)
        assert torch.equal(link(arcs(600, 3, 297), cu, 0.9999).unique(), torch.tensor([0, 600, 603]))
    finally:
        torch.set_num_threads(before)


BAD = st.sampled_from([-(2**63), -7, -1, 0, 1, 5, 30, 40, 41, 2**63 - 1])


@settings(deadline=None, max_examples=40)
@given(st.lists(BAD, min_size=1, max_size=5), st.sampled_from([0.2, -2.0]))
def test_no_boundaries_lead_outside_a_tensor(host_kernels, cu, threshold):
    """CUDA cannot look at the values without a sync: whatever they are, only rows of the tensors are touched."""
    label = np.full(42, 7, np.int64)
    host_kernels.similarity_components_float32(
        to_numpy(randn((40, 6), torch.float32)), 40, 6, 6, np.array(cu, np.int64), len(cu) - 1, threshold, 1e-8,
        label[1:-1],
    )  # fmt: skip
    assert label[0] == label[-1] == 7
    assert ((label[1:-1] >= -1) & (label[1:-1] < 40)).all()


def test_more_than_2_31_elements():
    """Row offsets are 64-bit: a strided view whose last row lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16))  # pages nobody touches take no memory
    rows = buffer.as_strided((3, 32), (2**30, 1))
    rows[:] = randn((3, 32), torch.float16, "far")
    assert torch.equal(link(rows, bounds(3), 0.1), link(rows.clone(), bounds(3), 0.1))
