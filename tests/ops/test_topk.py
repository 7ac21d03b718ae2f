"""topk: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import math
import struct
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok

from rooms import Case, Error, generator, poisoned, randn

NAN, INF = math.nan, math.inf
AWKWARD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, INF, -INF, NAN]


def problem(scores, lengths: list[int], ks: list[int], k: int | None = None) -> tuple:
    """The arguments of topk from segment lengths and their k."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    cu_seqlens, cu_k = (torch.tensor([0, *accumulate(sizes)], dtype=torch.int64) for sizes in (lengths, ks))
    return scores, cu_seqlens, cu_k, sum(ks) if k is None else k


def ties(rows: int) -> torch.Tensor:
    return torch.randint(-2, 3, (rows,), generator=generator("ties", rows)).float()


def cases() -> list[Case]:
    awkward = torch.tensor(AWKWARD * 3)
    ragged = [5, 0, 1, 40, 300, 77]
    made = {
        "ragged": problem(randn((sum(ragged),), torch.float32), ragged, [2, 3, 0, 11, 150, 77]),
        "ties": problem(ties(260), [100, 160], [31, 50]),
        "all-equal": problem(torch.full((150,), 0.25), [70, 80], [9, 79]),
        "awkward": problem(awkward, [11, 22], [5, 19]),
        "more-than-rows": problem(awkward, [11, 22], [15, 24]),
        "fewer-numbers-than-k": problem([NAN, 2.0, NAN, -INF, NAN, 1.0], [3, 3], [2, 3]),
        "one-segment": problem(randn((531,), torch.float32), [531], [130]),
        "tail": problem(randn((50,), torch.float32), [20, 30], [4, 6], k=33),
        "cut": problem(ties(50), [20, 30], [14, 16], k=19),
        "cut-before-a-segment": problem(ties(50), [20, 30], [14, 16], k=9),
        "rows-outside": problem([9.0, 1.0, 2.0, 9.0, 9.0], [1, 2], [1, 1]),
        "many": problem(ties(64 * 9), [9] * 64, [v % 11 for v in range(64)]),
        "frames": problem(randn((600,), torch.float32).sigmoid(), [300, 300], [150, 75]),
    }
    degenerate = {
        "no-segments": problem([1.0, 2.0], [], [], k=3),
        "no-rows": problem([], [0, 0], [2, 1]),
        "nothing": problem([], [], [], k=0),
        "one-row": problem([NAN], [1], [1]),
        "no-slots": problem([1.0], [1], [1], k=0),
        "nothing-wanted": problem([1.0], [1], [0]),
    }
    return [
        Case(f"{name}-{'largest' if largest else 'smallest'}", args, {"largest": largest})
        for name, args in {**made, **degenerate}.items()
        for largest in (True, False)
    ]


def errors() -> list[Error]:
    s, cu, cu_k, k = problem([1.0, 2.0, 3.0], [1, 2], [1, 1])
    bad, far = torch.tensor([0, 2, 1]), torch.tensor([0, 2, 4])
    return [
        Error("vtok::topk: expected scores of shape (S,), got (1, 3)", (s[None], cu, cu_k, k)),
        Error("vtok::topk: expected scores of dtype float32, got float16", (s.half(), cu, cu_k, k)),
        Error("vtok::topk: expected cu_seqlens of dtype int64, got int32", (s, cu.int(), cu_k, k)),
        Error("vtok::topk: expected cu_seqlens of shape (V+1,), got (0,)", (s, cu[:0], cu_k, k)),
        Error("vtok::topk: expected cu_k of shape (V+1,), got ()", (s, cu, cu_k[0], k)),
        Error("vtok::topk: expected cu_k of shape (V+1,)=(3,), got (2,)", (s, cu, cu_k[:2], k)),
        Error("vtok::topk: expected k >= 0, got -1", (s, cu, cu_k, -1)),
        Error(
            "vtok::topk: expected cu_seqlens ascending from 0 to at most S=3, got cu_seqlens[2]=1",
            (s, bad, cu_k, k),
            only_cpu=True,
        ),
        Error(
            "vtok::topk: expected cu_seqlens ascending from 0 to at most S=3, got cu_seqlens[2]=4",
            (s, far, cu_k, k),
            only_cpu=True,
        ),
        Error("vtok::topk: expected cu_k ascending from 0, got cu_k[2]=1", (s, cu, bad, k), only_cpu=True),
        Error("vtok::topk: expected cu_k ascending from 0, got cu_k[0]=1", (s, cu, cu_k + 1, k), only_cpu=True),
    ]


def run_host(kernels, args, largest=True, *, shared_keys: int, tile: int = 64, threads: int = 64) -> torch.Tensor:
    """The CUDA kernels; segments longer than shared_keys are read again, and tiles serve where the mean is longer."""
    scores, cu_seqlens, cu_k = (a.contiguous().numpy() for a in args[:3])
    rows, segments, slots, margin = scores.size, cu_k.size - 1, args[3], 8
    out = poisoned((slots + 2 * margin,), torch.int64)
    count = rows // tile + segments
    workspace = poisoned((1 + count + segments * 4096 + count * 128 + segments * 2,), torch.int64)
    inner = out[margin : margin + slots]
    kernels.topk(scores, rows, cu_seqlens, cu_k, segments, slots, largest, inner, workspace, shared_keys, tile, threads)
    outside = np.concatenate([out[:margin], out[margin + slots :]])
    assert (outside == poisoned((2 * margin,), torch.int64)).all(), "written outside the output"
    return torch.from_numpy(inner.copy())


def host(kernels, scores, cu_seqlens, cu_k, k, *, largest=True):
    args, rows, segments = (scores, cu_seqlens, cu_k, k), scores.shape[0], cu_k.shape[0] - 1
    cached = run_host(kernels, args, largest, shared_keys=max(rows, 1))
    read_again = run_host(kernels, args, largest, shared_keys=-(-rows // max(segments, 1)))
    tiles = run_host(kernels, args, largest, shared_keys=0)
    assert torch.equal(cached, read_again)
    assert torch.equal(cached, tiles)
    return cached


def oracle(scores: list[float], lengths: list[int], ks: list[int], k: int, largest: bool) -> list[int]:
    """The contract, word for word."""
    out, begin, slot = [-1] * k, 0, 0
    for n, wanted in zip(lengths, ks, strict=True):
        best = {r: (math.isnan(s), 0 if math.isnan(s) else -s if largest else s, r) for r, s in enumerate(scores)}
        rows = sorted(range(begin, begin + n), key=best.get)
        for i, row in enumerate(sorted(rows[:wanted])):
            if slot + i < k:
                out[slot + i] = row
        begin, slot = begin + n, slot + wanted
    return out


numbers = st.sampled_from(AWKWARD) | st.integers(-3, 3).map(float) | st.floats(width=32)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_oracle(data):
    lengths = data.draw(st.lists(st.integers(0, 12), max_size=4))
    ks = data.draw(st.lists(st.integers(0, 14), min_size=len(lengths), max_size=len(lengths)))
    rows = sum(lengths) + data.draw(st.integers(0, 2))
    scores = data.draw(st.lists(numbers, min_size=rows, max_size=rows))
    k = max(0, sum(ks) + data.draw(st.integers(-4, 3)))
    largest = data.draw(st.booleans())
    got = vtok.ops.topk(*problem(scores, lengths, ks, k), largest=largest)
    assert got.tolist() == oracle(scores, lengths, ks, k, largest)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=40), st.data())
def test_every_bit_pattern(host_kernels, bits, data):
    """Any 32 bits are a score: subnormals, both infinities, NaN of either sign and any payload."""
    scores = [struct.unpack("<f", struct.pack("<I", b))[0] for b in bits]
    k, largest = data.draw(st.integers(1, len(bits))), data.draw(st.booleans())
    args = problem(torch.from_numpy(np.array(bits, np.uint32).view(np.float32)), [len(bits)], [k])
    want = oracle(scores, [len(bits)], [k], k, largest)
    assert vtok.ops.topk(*args, largest=largest).tolist() == want
    assert run_host(host_kernels, args, largest, shared_keys=0, tile=16).tolist() == want


@pytest.mark.parametrize("values", [ties, lambda n: randn((n,), torch.float32), torch.ones])
@pytest.mark.parametrize("rows", [1024, 1025, 65536, 65537, 200_000])
def test_published_rule(rows, values):
    """The retention mask of EVS, the first K of a stable descending argsort, across the CPU's block sizes."""
    scores, k = values(rows), rows // 4
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:k]] = True
    assert torch.equal(vtok.ops.topk(*problem(scores, [rows], [k])), mask.nonzero()[:, 0])


def test_many_threads_agree_with_one():
    args = problem(ties(500_000), [3, 150_000, 0, 300_000, 49_997], [2, 70_000, 1, 12_345, 49_998])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = vtok.ops.topk(*args)
    torch.set_num_threads(4)
    four = vtok.ops.topk(*args)
    torch.set_num_threads(threads)
    assert torch.equal(one, four)


@pytest.mark.parametrize("threads, shared_keys, tile", [(1024, 20_000, 64), (1024, 0, 4096), (256, 6_000, 64)])
def test_long_segments_on_the_device(host_kernels, threads, shared_keys, tile):
    """Real block sizes: one segment over several rounds of a block, cached, in tiles, and read again."""
    scores = torch.where(torch.rand(16_500) < 0.3, 0.5, torch.rand(16_500))
    args = problem(scores, [100, 16_384, 0], [30, 8_000, 2])
    got = run_host(host_kernels, args, shared_keys=shared_keys, tile=tile, threads=threads)
    assert torch.equal(got, vtok.ops.topk(*args))


@pytest.mark.parametrize("shared_keys", [0, 100_000])
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_bad_boundaries_stay_inside(host_kernels, shared_keys, data):
    """Boundaries on a device can't be checked: whatever they are, kernels end, and write rows and slots that exist."""
    anything = st.integers(-5, 60) | st.sampled_from([-(2**63), 2**63 - 1, 2**32])
    boundaries = st.lists(anything, min_size=4, max_size=4).map(torch.tensor)
    args = (randn((40,), torch.float32), data.draw(boundaries), data.draw(boundaries), 20)
    got = run_host(host_kernels, args, shared_keys=shared_keys, tile=8)
    poison = torch.from_numpy(poisoned((1,), torch.int64))
    assert bool((((got >= -1) & (got < 40)) | (got == poison)).all())


def test_a_segment_is_alone(host_kernels):
    """A video's choice does not depend on the rest of the batch."""
    alone, other = ties(300), randn((90,), torch.float32)
    want = vtok.ops.topk(*problem(alone, [300], [77]))
    args = problem(torch.cat([other, alone, other]), [90, 300, 90], [8, 77, 3])
    assert torch.equal(vtok.ops.topk(*args)[8:85] - 90, want)
    assert torch.equal(host(host_kernels, *args)[8:85] - 90, want)
