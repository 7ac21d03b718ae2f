"""temporal_similarity: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok.ops import _canonical
from vtok.ops._rooms import ROOMS

from rooms import FLOATS, Case, Error, from_numpy, poisoned, randn, same_bits, to_numpy

similarity = vtok.ops.temporal_similarity


def layout(*videos: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens and tokens_per_frame of videos given as (rows, rows of a frame)."""
    return torch.tensor([0, *(rows for rows, _ in videos)]).cumsum(0), torch.tensor([n for _, n in videos] or [0])[
        : len(videos)
    ]


ONE = layout((15, 3))
# an incomplete last frame, an empty video, one frame, a frame longer than its video, no frames, sites of one row
RAGGED = layout((11, 4), (0, 5), (3, 3), (2, 7), (4, 0), (9, 1), (2, -1), (6, 2))


def clip(D: int, dtype: torch.dtype, rows: int = 40) -> torch.Tensor:
    return randn((rows, D), dtype, "clip")


def planted() -> torch.Tensor:
    """Zeros, a repeated row, an opposite one, NaN, infinities, values whose squares overflow or vanish."""
    x = randn((15, 65), torch.float32, "planted")
    x[3], x[4], x[6] = 0, x[1], 0
    x[5] = -x[2]
    x[7, 3], x[8, 64], x[9, 0] = math.nan, math.inf, -math.inf
    x[10], x[11], x[12] = 3e19, 1e-30, -0.0
    return x


def cases() -> list[Case]:
    return [
        *(Case(f"ragged-{D}-{str(dtype)[6:]}", (clip(D, dtype), *RAGGED)) for D in (1, 77) for dtype in FLOATS),
        *(Case(f"ragged-{D}", (clip(D, torch.bfloat16), *RAGGED)) for D in (63, 64, 512, 513)),
        Case("l2", (clip(65, torch.float16), *RAGGED), {"metric": "l2"}),
        Case("l2-1152", (clip(1152, torch.bfloat16, 15), *ONE), {"metric": "l2"}),
        Case("3584", (clip(3584, torch.bfloat16, 15), *ONE)),
        Case("float64", (clip(130, torch.float64), *RAGGED)),
        Case("several-runs", (clip(6, torch.float32, 90), *layout((70, 3), (11, 5)))),
        Case("planted", (planted(), *ONE)),
        Case("planted-l2", (planted(), *ONE), {"metric": "l2"}),
        Case("static", (clip(66, torch.float16, 1).expand(15, 66), *ONE)),
        Case("eps", (clip(16, torch.float32), *RAGGED), {"eps": 16.0}),
        Case("no-videos", (clip(8, torch.float32, 3), *layout())),
        Case("no-rows", (torch.empty(0, 8), *layout((0, 2)))),
        Case("no-columns", (torch.empty(6, 0), *layout((6, 2)))),
    ]


def grad_cases() -> list[Case]:
    tokens = clip(5, torch.float64, 42).requires_grad_()
    bounded = torch.cat([torch.full((9, 5), 1e-3, dtype=torch.float64), clip(5, torch.float64, 33)]).requires_grad_()
    return [
        Case("cosine", (tokens, *RAGGED)),
        Case("l2", (tokens, *RAGGED), {"metric": "l2"}),
        Case("eps", (bounded, *RAGGED), {"eps": 1e-2}),
    ]


def errors() -> list[Error]:
    x, (cu, n) = torch.randn(15, 7), layout((6, 2), (9, 3))
    op = "vtok::temporal_similarity: expected "
    floats = "tokens of dtype float32, float16, bfloat16 or float64"
    return [
        Error(f"{op}tokens of shape (S, D), got (7,)", (x[0], cu, n)),
        Error(f"{op}{floats}, got int64", (x.long(), cu, n)),
        Error(f"{op}cu_seqlens of shape (V+1,), got (1, 3)", (x, cu[None], n)),
        Error(f"{op}cu_seqlens of dtype int64, got int32", (x, cu.int(), n)),
        Error(f"{op}cu_seqlens of shape (V+1,), got (0,)", (x, cu[:0], n)),
        Error(f"{op}tokens_per_frame of dtype int64, got float32", (x, cu, n.float())),
        Error(f"{op}tokens_per_frame of shape (V,)=(2,), got (3,)", (x, cu, torch.tensor([1, 2, 3]))),
        Error(f'{op}metric of "cosine" or "l2", got "l1"', (x, cu, n), {"metric": "l1"}),
        Error(f"{op}eps finite and >= 0, got -1", (x, cu, n), {"eps": -1.0}),
        Error(f"{op}eps finite and >= 0, got inf", (x, cu, n), {"eps": math.inf}),
        Error(
            f"{op}cu_seqlens ascending from 0 to at most S=15, got cu_seqlens[2]=16",
            (x, torch.tensor([0, 6, 16]), n),
            only_cpu=True,
        ),
        Error(
            f"{op}cu_seqlens ascending from 0 to at most S=15, got cu_seqlens[0]=1",
            (x, torch.tensor([1, 6, 15]), n),
            only_cpu=True,
        ),
    ]


def host(kernels, tokens, cu_seqlens, tokens_per_frame, *, metric="cosine", eps=1e-8):
    scores = poisoned((tokens.shape[0],), _canonical.accumulator(tokens.dtype))
    if tokens.shape[0]:
        getattr(kernels, f"temporal_similarity_{str(tokens.dtype)[6:]}")(
            to_numpy(tokens), *tokens.shape[:1], tokens.shape[1], tokens.shape[1], to_numpy(cu_seqlens),
            to_numpy(tokens_per_frame), tokens_per_frame.shape[0], metric == "l2", eps, scores,
        )  # fmt: skip
    return from_numpy(scores)


def by_the_rule(values: torch.Tensor) -> float:
    """The canonical sum of one row of float32 values, one scalar operation at a time."""
    lanes = [np.float32(0)] * 64
    for start in range(0, max(len(values), 1), 512):
        partial = [np.float32(0)] * 64
        for i, value in enumerate(values[start : start + 512].numpy()):
            partial[i % 64] = partial[i % 64] + value
        lanes = [total + part for total, part in zip(lanes, partial, strict=True)]
    for h in (32, 16, 8, 4, 2, 1):
        lanes = [lanes[i] + lanes[i + h] for i in range(h)]
    return float(lanes[0])


@pytest.mark.parametrize("D", [0, 1, 63, 64, 65, 512, 513, 1152, 3584])
def test_the_order_of_sums(D):
    values = randn((D,), torch.float32, "order")
    assert float(_canonical.total(values)) == by_the_rule(values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_against_float64(dtype, metric):
    """Within the bound of a sum in 8 + D/512 + 6 steps."""
    x, (cu, n) = randn((60, 1152), dtype, metric), layout((60, 12))
    a, b = x.double()[:-12], x.double()[12:]
    exact = torch.nn.functional.cosine_similarity(a, b, dim=-1) if metric == "cosine" else -(a - b).norm(dim=-1)
    torch.testing.assert_close(similarity(x, cu, n, metric=metric)[12:].double(), exact, rtol=0, atol=3e-5)


def test_what_is_compared_with_what():
    """One-hot rows: 1 where the row one frame earlier in the same video is the same, else 0."""
    cu, n = RAGGED
    site = torch.arange(40) % 5
    scores = similarity(torch.eye(5)[site], cu, n)
    for s in range(40):
        v = next((v for v in range(len(n)) if cu[v] <= s < cu[v + 1]), None)
        before = s - n[v] if v is not None and n[v] > 0 else -1
        has_before = v is not None and before >= cu[v]
        assert scores[s] == (float(site[before] == site[s]) if has_before else -math.inf)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("D", [1, 77, 3584])
def test_identical_rows_give_exactly_one(D, dtype):
    frame = randn((7, D), dtype, "identical")
    assert similarity(frame.repeat(3, 1), *layout((21, 7)))[7:].tolist() == [1.0] * 14
    assert similarity(frame.repeat(3, 1), *layout((21, 7)), metric="l2")[7:].tolist() == [0.0] * 14


def test_zero_rows_give_zero():
    assert similarity(torch.zeros(6, 9), *layout((6, 2)))[2:].tolist() == [0.0] * 4


def test_nan_and_infinity_stay_in_their_rows():
    scores = similarity(planted(), *ONE)
    assert scores[[7, 8, 9, 10, 11, 12]].isnan().all()  # their own row or the one before
    assert scores[[3, 4, 5, 6, 13, 14]].isfinite().all()
    assert scores[[4, 5]].tolist() == [1.0, -1.0]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(-1, 9)), max_size=5),
    st.integers(1, 70),
    st.integers(0, 9),
    st.sampled_from(["cosine", "l2"]),
)
def test_any_layout(host_kernels, videos, D, beyond, metric):
    """All of them equal the reference, and a video scores the same alone as in the batch."""
    cu, n = layout(*videos)
    x = randn((int(cu[-1]) + beyond, D), torch.bfloat16, "any", *videos)
    want = ROOMS["temporal_similarity"].reference(x, cu, n, metric=metric)
    assert same_bits(similarity(x, cu, n, metric=metric), want)
    assert same_bits(host(host_kernels, x, cu, n, metric=metric), want)
    for v, (rows, frame) in enumerate(videos):
        alone = similarity(x[cu[v] : cu[v + 1]], *layout((rows, frame)), metric=metric)
        assert same_bits(alone, want[cu[v] : cu[v + 1]])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("frame", [1, 13, 600])
def test_threads_share_a_video_anywhere(threads, frame):
    """A thread that starts within a block of sites computes the norms it did not see."""
    x, (cu, n) = randn((1300, 130), torch.float32, frame), layout((1300, frame))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_bits(similarity(x, cu, n), ROOMS["temporal_similarity"].reference(x, cu, n))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("D", [4097, 8193])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_rows_longer_than_a_block(host_kernels, D, dtype):
    """On CUDA such a row is taken in parts, whose sums go on from one another."""
    x, (cu, n) = randn((7, D), dtype, "long"), layout((7, 1))
    want = ROOMS["temporal_similarity"].reference(x, cu, n)
    assert same_bits(similarity(x, cu, n), want)
    assert same_bits(host(host_kernels, x, cu, n), want)


@pytest.mark.parametrize("column, D", [(1, 64), (2, 63), (2, 64)])
def test_unaligned_rows(host_kernels, column, D):
    """Rows that start off a pair's boundary, or end within a pair, are read value by value."""
    wide = randn((8, 70), torch.bfloat16, "unaligned")
    cu, n = layout((8, 2))
    flat, scores = to_numpy(wide).reshape(-1)[column:], poisoned((8,), torch.float32)
    host_kernels.temporal_similarity_bfloat16(flat, 8, 70, D, to_numpy(cu), to_numpy(n), 1, False, 1e-8, scores)
    assert same_bits(from_numpy(scores), similarity(wide[:, column : column + D], cu, n))


BAD = st.sampled_from([-(2**63), -7, -1, 0, 1, 5, 30, 40, 41, 2**63 - 1])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(BAD, BAD), max_size=4), BAD)
def test_no_layout_leads_outside_a_tensor(host_kernels, videos, first):
    """CUDA cannot look at the values without a sync: whatever they are, only rows of the tensors are touched."""
    cu = np.array([first, *(boundary for boundary, _ in videos)], dtype=np.int64)
    n = np.array([frame for _, frame in videos] or [0], dtype=np.int64)
    guarded = np.full(40 + 2, 7, dtype=np.float32)
    tokens = to_numpy(clip(6, torch.float32))
    host_kernels.temporal_similarity_float32(tokens, 40, 6, 6, cu, n, len(videos), False, 1e-8, guarded[1:-1])
    assert guarded[0] == guarded[-1] == 7
    assert (guarded[1:-1] <= 1.001).sum() + (guarded[1:-1] == 7).sum() == 40


def test_no_gradient_where_eps_bounds_or_rows_coincide():
    x = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    similarity(x, *layout((6, 2)), metric="l2")[2:].sum().backward()
    assert x.grad.tolist() == torch.zeros(6, 4).tolist()
    zeros = torch.zeros(6, 4, requires_grad=True)
    similarity(zeros, *layout((6, 2)))[2:].sum().backward()
    assert zeros.grad.tolist() == torch.zeros(6, 4).tolist()


def test_gradient_in_the_dtype_of_tokens():
    x = clip(9, torch.bfloat16).requires_grad_()
    scores = similarity(x, *RAGGED)
    scores.where(scores.isfinite(), 0).sum().backward()
    exact = x.detach().double().requires_grad_()
    scores = similarity(exact, *RAGGED)
    scores.where(scores.isfinite(), 0).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)


def test_more_than_2_31_elements():
    """Row offsets are 64-bit: a strided view whose last row lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16))  # pages nobody touches take no memory
    tokens = buffer.as_strided((3, 32), (2**30, 1))
    tokens[:] = randn((3, 32), torch.float16, "far")
    assert same_bits(similarity(tokens, *layout((3, 1))), similarity(tokens.clone(), *layout((3, 1))))
