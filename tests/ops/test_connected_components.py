"""connected_components: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok

from rooms import Case, Error, from_numpy, generator, poisoned, to_numpy

components = vtok.ops.connected_components
FAR = torch.iinfo(torch.int64)


def edges(*pairs: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous())


def random(count: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randint(-1, n, (2, count), generator=generator(count, n)))


def path(n: int, *, shuffled: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """All nodes in one row: the longest way that a label can have to go."""
    order = torch.randperm(n, generator=generator(n)) if shuffled else torch.arange(n)
    return order[1:], order[:-1]


def cases() -> list[Case]:
    star = torch.arange(599), torch.full((599,), 599)
    return [
        Case("no-nodes", (*edges(), 0)),
        Case("no-edges", (*edges(), 600)),
        Case("edges-of-no-nodes", (*edges((0, 0), (0, 1)), 0)),
        Case("one-edge", (*edges((3, 1)), 5)),
        Case("one-node", (*edges((0, 0)), 1)),
        Case("loops", (torch.arange(40), torch.arange(40), 40)),
        Case("outside", (*edges((0, 4), (-1, 2), (2, -1), (3, 5), (FAR.max, 1), (1, FAR.min), (2**32, 3)), 5)),
        Case("ring", (torch.arange(300), (torch.arange(300) + 1) % 300, 300)),
        Case("path", (*path(600), 600)),
        Case("path-backwards", (*(x.flip(0) for x in path(600)), 600)),
        Case("path-shuffled", (*path(600, shuffled=True), 600)),
        Case("star-below", (*star, 600)),
        Case("star-above", (torch.arange(1, 600), torch.zeros(599, dtype=torch.int64), 600)),
        Case("two-halves", (torch.arange(600), torch.arange(600) % 2, 600)),
        Case("sparse", (*random(300, 700), 700)),
        Case("critical", (*random(350, 700), 700)),
        Case("dense", (*random(1500, 257), 257)),
        Case("the-same-again", (*(x.repeat(20) for x in edges((5, 9), (9, 2), (7, 8))), 10)),
    ]


def errors() -> list[Error]:
    a, b = edges((0, 1), (1, 2))
    op = "vtok::connected_components: expected "
    return [
        Error(f"{op}source of shape (E,), got (1, 2)", (a[None], b, 3)),
        Error(f"{op}source of dtype int64, got int32", (a.int(), b, 3)),
        Error(f"{op}target of shape (E,), got (1, 2)", (a, b[None], 3)),
        Error(f"{op}target of dtype int64, got float32", (a, b.float(), 3)),
        Error(f"{op}target of shape (E,)=(2,), got (1,)", (a, b[:1], 3)),
        Error(f"{op}n >= 0, got -1", (a, b, -1)),
    ]


def host(kernels, source, target, n):
    label = poisoned((n,), torch.int64)
    kernels.connected_components(to_numpy(source), to_numpy(target), source.shape[0], n, label)
    return from_numpy(label)


def by_the_rule(pairs: list[tuple[int, int]], n: int) -> list[int]:
    """Edges as sets of nodes that flow together."""
    parts = [{i} for i in range(n)]
    for a, b in pairs:
        if 0 <= a < n and 0 <= b < n and parts[a] is not parts[b]:
            parts[a] |= parts[b]
            for i in parts[b]:
                parts[i] = parts[a]
    return [min(part) for part in parts]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(-2, 14), st.integers(-2, 14)), max_size=25), st.integers(0, 13), st.integers(0, 9)
)
def test_the_rule(host_kernels, pairs, n, seed):
    want = by_the_rule(pairs, n)
    host_kernels.seed(seed)
    assert components(*edges(*pairs), n).tolist() == want
    assert host(host_kernels, *edges(*pairs), n).tolist() == want


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_roots_of_a_forest(data):
    """Edges that each lead to a lower node: the label is where the way down ends."""
    n = data.draw(st.integers(1, 40))
    below = [data.draw(st.integers(-1, i - 1)) for i in range(n)]
    roots = []
    for i in range(n):
        roots.append(roots[below[i]] if below[i] >= 0 else i)
    assert components(torch.arange(n), torch.tensor(below), n).tolist() == roots


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    """Edges enough for several threads, which join the same components at the same time."""
    n, before = 50_000, torch.get_num_threads()
    for source, target in (path(n), path(n, shuffled=True), random(n, n), random(3 * n, n)):
        torch.set_num_threads(1)
        want = components(source, target, n)
        torch.set_num_threads(threads)
        try:
            assert torch.equal(components(source, target, n), want)
        finally:
            torch.set_num_threads(before)
    assert components(*path(n, shuffled=True), n).max() == 0


@pytest.mark.parametrize("seed", range(8))
def test_whoever_comes_between(host_kernels, seed):
    """Joins of the same few nodes by many threads, in any order."""
    source, target = random(900, 40)
    chain = torch.arange(1, 40)
    source, target = torch.cat([source, chain]), torch.cat([target, chain - 1])
    host_kernels.seed(seed)
    assert host(host_kernels, source.flip(0), target.flip(0), 40).tolist() == [0] * 40


BAD = st.sampled_from([-(2**63), -7, -1, 0, 1, 5, 9, 10, 11, 2**31, 2**63 - 1])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(BAD, BAD), min_size=1, max_size=9))
def test_no_edge_leads_outside_the_labels(host_kernels, pairs):
    label = np.full(12, 7, np.int64)
    source, target = edges(*pairs)
    host_kernels.connected_components(to_numpy(source), to_numpy(target), len(pairs), 10, label[1:-1])
    assert label[0] == label[-1] == 7
    assert label[1:-1].tolist() == by_the_rule(pairs, 10)
