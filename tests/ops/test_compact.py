"""compact: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok

from rooms import Case, Error, from_numpy, generator, poisoned, to_numpy

TILE = 4096  # rows a block looks at at a time, csrc/compact/compact.cuh


def mask(rows: int, share: float) -> torch.Tensor:
    return torch.rand(rows, generator=generator(rows, share)) < share


def boundaries(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def cases() -> list[Case]:
    tiny = torch.arange(0, TILE + 300, 2)  # two rows a video, over more than a tile
    return [
        Case("one-row", (mask(1, 1.0), boundaries(0, 1), 1)),
        Case("empty", (mask(0, 0.5), boundaries(0), 0)),
        Case("no-rows", (mask(0, 0.5), boundaries(0, 0, 0), 3)),
        Case("no-videos", (mask(9, 0.5), boundaries(0), 4)),
        Case("all-kept", (mask(77, 1.0), boundaries(0, 50, 77), 77)),
        Case("all-kept-of-many", (mask(17000, 1.0), boundaries(0, 16900, 17000), 16999)),
        Case("none-kept", (mask(77, 0.0), boundaries(0, 50, 77), 5)),
        Case("capacity-0", (mask(77, 0.5), boundaries(0, 77), 0)),
        Case("capacity-small", (mask(300, 0.5), boundaries(0, 100, 300), 60)),
        Case("capacity-large", (mask(300, 0.3), boundaries(0, 100, 300), 1000)),
        Case("capacity-tiles", (mask(300, 0.3), boundaries(0, 100, 300), 2 * TILE + 1)),
        Case("empty-segments", (mask(129, 0.5), boundaries(0, 0, 64, 64, 64, 129, 129), 129)),
        Case("rows-past-the-end", (mask(200, 0.7), boundaries(0, 20, 150), 200)),
        Case("one-over-a-tile", (mask(TILE + 1, 0.4), boundaries(0, 5, TILE, TILE + 1), TILE)),
        Case("ends-on-tiles", (mask(2 * TILE, 0.1), boundaries(0, TILE, TILE, 2 * TILE), 600)),
        Case("many-tiny-videos", (mask(TILE + 300, 0.5), tiny, TILE)),
    ]


def errors() -> list[Error]:
    keep, cu = mask(10, 0.5), boundaries(0, 4, 10)
    ascending = "vtok::compact: expected cu_seqlens ascending from 0 to at most S=10, got "
    return [
        Error("vtok::compact: expected keep of shape (S,), got (1, 10)", (keep[None], cu, 4)),
        Error("vtok::compact: expected keep of dtype bool, got uint8", (keep.byte(), cu, 4)),
        Error("vtok::compact: expected cu_seqlens of shape (V+1,), got (1, 3)", (keep, cu[None], 4)),
        Error("vtok::compact: expected cu_seqlens of shape (V+1,), got (0,)", (keep, cu[:0], 4)),
        Error("vtok::compact: expected cu_seqlens of dtype int64, got int32", (keep, cu.int(), 4)),
        Error("vtok::compact: expected capacity >= 0, got -1", (keep, cu, -1)),
        Error(ascending + "cu_seqlens[0]=1", (keep, cu + 1, 4), only_cpu=True),
        Error(ascending + "cu_seqlens[2]=3", (keep, boundaries(0, 4, 3), 4), only_cpu=True),
        Error(ascending + "cu_seqlens[1]=11", (keep, boundaries(0, 11), 4), only_cpu=True),
    ]


def host(kernels, keep, cu_seqlens, capacity):
    videos = cu_seqlens.shape[0] - 1
    index, counts = poisoned((capacity,), torch.int64), poisoned((videos,), torch.int64)
    spans = min(max(-(-max(keep.shape[0], capacity) // TILE), 1), 512)
    kernels.compact(
        to_numpy(keep), keep.shape[0], to_numpy(cu_seqlens), videos, index, capacity, counts,
        poisoned((spans,), torch.int64),
    )  # fmt: skip
    return from_numpy(index), from_numpy(counts)


@pytest.mark.parametrize("shift", [1, 8, 15])
def test_unaligned_masks(host_kernels, shift):
    """A mask that starts off a 16-byte boundary is read byte by byte, not across its ends."""
    keep, cu = mask(600, 0.5), boundaries(0, 77, 600 - shift)
    wide = np.zeros(640, dtype=bool)
    start = -wide.ctypes.data % 16 + shift
    view = wide[start : start + 600 - shift]
    view[:] = keep[shift:]
    index, counts = poisoned((600,), torch.int64), poisoned((2,), torch.int64)
    host_kernels.compact(view, view.size, to_numpy(cu), 2, index, 600, counts, poisoned((1,), torch.int64))
    want = vtok.ops.compact(keep[shift:], cu, 600)
    assert torch.equal(from_numpy(index), want[0]) and torch.equal(from_numpy(counts), want[1])


def test_any_nonzero_byte_is_kept(host_kernels):
    """As in PyTorch, where a bool that came from other memory is true unless its byte is 0."""
    keep = torch.tensor([0, 1, 2, 128, 255, 0, 127, 3] * 40, dtype=torch.uint8).view(torch.bool)
    cu = boundaries(0, 320)
    rows = torch.tensor([r for r in range(320) if r % 8 not in (0, 5)])
    for index, counts in (vtok.ops.compact(keep, cu, 240), host(host_kernels, keep, cu, 240)):
        assert torch.equal(index, rows) and counts.tolist() == [240]


@pytest.mark.parametrize("cu", [(3, 7), (-9, 5, 2**62), (0, 5000, 4, 9000), (0, -(2**63), 2**63 - 1), (4, 3, 2, 1)])
def test_untrusted_boundaries_stay_inside(host_kernels, cu):
    """Where looking at boundaries would cost a sync, bad ones give rows without meaning, but rows of the input."""
    keep = mask(5000, 0.5)
    index, counts = host(host_kernels, keep, boundaries(*cu), 100)
    assert counts.shape == (len(cu) - 1,) and bool(((index >= -1) & (index < 5000)).all())


def test_every_span_length():
    """Chunks of rows that threads list on their own meet without a gap, at every capacity around a chunk's end."""
    keep = mask(40000, 0.5)
    rows = keep.nonzero()[:, 0]
    middle = int(keep[:16384].sum())
    for capacity in (1, *range(middle - 9, middle + 10), 40000):
        index, counts = vtok.ops.compact(keep, boundaries(0, 40000), capacity)
        want = torch.full((capacity,), -1)
        want[: min(capacity, len(rows))] = rows[:capacity]
        assert torch.equal(index, want) and int(counts) == len(rows)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.booleans(), max_size=40), max_size=8), st.integers(0, 120), st.integers(0, 3))
def test_properties(videos, capacity, past):
    """What is listed is what the mask keeps, in order; unpacking the list gives back the mask."""
    keep = torch.tensor([k for video in videos for k in video] + [True] * past, dtype=torch.bool)
    cu = torch.tensor([0, *(len(video) for video in videos)]).cumsum(0)
    index, counts = vtok.ops.compact(keep, cu, capacity)
    assert counts.tolist() == [sum(video) for video in videos]
    listed = index[index >= 0]
    assert len(listed) == min(capacity, int(counts.sum())) and bool((index[len(listed) :] == -1).all())
    assert bool((listed.diff() > 0).all()) and bool(keep[listed].all())
    if capacity >= len(keep):
        assert torch.equal(torch.zeros_like(keep).index_fill_(0, listed, True)[: cu[-1]], keep[: cu[-1]])


def test_more_tiles_than_blocks(host_kernels):
    """Blocks that go over several tiles, the last over none."""
    keep = mask(513 * TILE + 5, 0.01)
    cu = boundaries(0, 3 * TILE, 4 * TILE + 1, len(keep) - 7)
    index, counts = host(host_kernels, keep, cu, 20000)
    want = vtok.ops.compact(keep, cu, 20000)
    assert torch.equal(index, want[0]) and torch.equal(counts, want[1])
