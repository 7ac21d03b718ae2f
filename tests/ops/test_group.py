"""group: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok

from rooms import Case, Error, from_numpy, generator, poisoned, to_numpy

TILE, DIGIT, BINS = 4096, 9, 512  # rows a block sorts at a time, bits of a digit at most; csrc/group/group.cuh
FAR = torch.iinfo(torch.int64)


def groups(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random(rows: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high, (rows,), generator=generator(rows, low, high))


def cases() -> list[Case]:
    giant = torch.where(random(TILE + 900, 0, 10) < 9, 700, random(TILE + 900, -1, 1400))
    return [
        Case("one-row", (groups(0), 1)),
        Case("empty", (groups(), 0)),
        Case("no-rows", (groups(), 600)),
        Case("no-groups", (groups(0, -1, 3), 0)),
        Case("one-group", (groups(*[0] * 100), 1)),
        Case("nobody", (groups(*[-1] * 100), 700)),
        Case("beyond", (groups(4, FAR.max, 1, FAR.min, -2, 3, 1, 5, 2**32 + 1, 2**32), 4)),
        Case("duplicates", (random(301, -1, 5), 5)),
        Case("two-groups", (random(301, 0, 2), 2)),
        Case("reversed", (torch.arange(599, -1, -1), 600)),
        Case("sparse", (random(50, 0, 9000) * 3, 27000)),
        Case("one-bin-less", (random(700, -1, BINS), BINS)),
        Case("one-bin-more", (random(700, -1, BINS + 1), BINS + 1)),
        Case("one-over-a-tile", (random(TILE + 1, -1, 300), 300)),
        Case("one-giant-group", (giant, 1400)),
        Case("three-digits", (random(700, -1, 270000), 270000)),
    ]


def errors() -> list[Error]:
    return [
        Error("vtok::group: expected assignment of shape (S,), got (1, 2)", (groups(0, 1)[None], 2)),
        Error("vtok::group: expected assignment of dtype int64, got int32", (groups(0, 1).int(), 2)),
        Error("vtok::group: expected k >= 0, got -3", (groups(0, 1), -3)),
    ]


def host(kernels, assignment, k):
    rows = assignment.shape[0]
    members, offsets = poisoned((rows,), torch.int64), poisoned((k + 1,), torch.int64)
    width = max((k - 1).bit_length(), 1) if k else 1
    passes = -(-width // DIGIT)
    bins = 2 ** -(-width // passes)
    words = 2 + passes + passes * bins * (1 + max(-(-rows // TILE), 1))
    scratch = poisoned((rows if passes > 1 else 0,), torch.int64)
    kernels.group(
        to_numpy(assignment), rows, k, members, offsets, scratch, torch.zeros(words, dtype=torch.int64).numpy()
    )
    return from_numpy(members), from_numpy(offsets)


def check(assignment: torch.Tensor, k: int, members: torch.Tensor, offsets: torch.Tensor) -> None:
    """Each group lists its rows, all of them, in order."""
    assert offsets[0] == 0 and bool((offsets.diff() >= 0).all())
    for g in range(k):
        assert torch.equal(members[offsets[g] : offsets[g + 1]], (assignment == g).nonzero()[:, 0])
    assert bool((members[offsets[k] :] == -1).all())


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-2, 12), max_size=80), st.integers(0, 10))
def test_properties(values, k):
    """The groups partition the rows that have one, so that unpacking the members gives back the assignment."""
    assignment = groups(*values)
    members, offsets = vtok.ops.group(assignment, k)
    check(assignment, k, members, offsets)
    inside = (assignment >= 0) & (assignment < k)
    back = torch.full_like(assignment, -1)
    back[members[: offsets[k]]] = torch.repeat_interleave(torch.arange(k), offsets.diff())
    assert torch.equal(back, torch.where(inside, assignment, -1))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 7, 70000])
def test_threads_do_not_matter(threads, k):
    """Rows enough for several threads, each with cursors of its own."""
    assignment = random(211111, -1, k)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        members, offsets = vtok.ops.group(assignment, k)
    finally:
        torch.set_num_threads(before)
    order = assignment.argsort(stable=True)[int((assignment < 0).sum()) :]
    assert torch.equal(members[: len(order)], order) and bool((members[len(order) :] == -1).all())
    assert torch.equal(offsets[1:], assignment[assignment >= 0].bincount(minlength=k).cumsum(0))


def test_many_tiles(host_kernels):
    """Look-back over more tiles than are in flight together, whatever order the blocks run in."""
    assignment = random(9 * TILE + 5, -1, 3)
    host_kernels.seed(7)
    check(assignment, 3, *host(host_kernels, assignment, 3))
