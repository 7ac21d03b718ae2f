"""run_curve: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok.ops._rooms import ROOMS

from rooms import FLOATS, Case, Error, from_numpy, generator, outputs, poisoned, randn, same_bits, to_numpy

run_curve = vtok.ops.run_curve


def layout(*videos: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens and tokens_per_frame of videos given as (rows, rows of a frame)."""
    cu = torch.tensor([0, *(rows for rows, _ in videos)]).cumsum(0)
    return cu, torch.tensor([n for _, n in videos] or [0])[: len(videos)]


# an incomplete last frame, an empty video, one frame, a frame longer than its video, no frames, sites of one row
RAGGED = layout((11, 4), (0, 5), (3, 3), (2, 7), (4, 0), (9, 1), (2, -1), (6, 2))  # 37 rows


def clip(D: int, dtype: torch.dtype, rows: int = 40) -> torch.Tensor:
    return (randn((1, D), torch.float32, "scene") + randn((rows, D), torch.float32, "clip")).to(dtype)


def whole_numbers(rows: int, D: int) -> torch.Tensor:
    """Small integers: every sum is exact, and costs tie."""
    return torch.randint(-2, 3, (rows, D), generator=generator("whole", rows, D)).float()


def planted() -> torch.Tensor:
    """Sites of 6 with NaN, infinities, squares that overflow, a cut, nothing that moves, zeros."""
    x = whole_numbers(54, 5)
    x[9, 2], x[19, 0], x[29, 1], x[30] = math.nan, math.inf, -math.inf, 3e19
    x[4::9] = x[4]
    x[5::9] = torch.tensor([0.0, 0, 0, 8, 8, 8])[:, None]
    x[6::9] = -0.0
    return x


def weighing(rows: int) -> torch.Tensor:
    return torch.randint(0, 5, (rows,), generator=generator("weights", rows)).float()


def cases() -> list[Case]:
    return [
        *(Case(f"ragged-{str(t)[6:]}", (clip(77, t), *RAGGED, 9)) for t in (*FLOATS, torch.float64)),
        Case("ragged-1", (clip(1, torch.float32), *RAGGED, 20)),
        Case("513", (clip(513, torch.bfloat16), *RAGGED, 9), {"extra_rows": 1}),
        Case("1200", (clip(1200, torch.float16, 21), *layout((21, 3)), 7)),
        Case("weights", (clip(30, torch.float32), *RAGGED, 9), {"weights": weighing(40) / 3}),
        Case("exact-ragged", (whole_numbers(40, 9), *RAGGED, 64)),
        Case("exact-extra", (whole_numbers(40, 4), *RAGGED, 9), {"extra_rows": 3}),
        Case("exact-weights", (whole_numbers(40, 6), *RAGGED, 10), {"weights": weighing(40)}),
        Case("exact-planted", (planted(), *layout((54, 9)), 6)),
        Case("exact-two-words", (whole_numbers(70, 3), *layout((66, 1), (4, 2)), 100)),
        Case("exact-tiles", (whole_numbers(37, 70), *layout((37, 1)), 37)),
        Case("exact-static", (whole_numbers(1, 8).expand(15, 8), *layout((15, 3)), 5)),
        Case("exact-no-videos", (whole_numbers(3, 8), *layout(), 1)),
        Case("exact-no-rows", (torch.empty(0, 8), *layout((0, 2)), 1)),
        Case("exact-no-columns", (torch.empty(6, 0), *layout((6, 2)), 3)),
    ]


def errors() -> list[Error]:
    x, (cu, n) = torch.randn(15, 7), layout((6, 2), (9, 3))
    op = "vtok::run_curve: expected "
    floats = "tokens of dtype float32, float16, bfloat16 or float64"
    return [
        Error(f"{op}tokens of shape (S, D), got (7,)", (x[0], cu, n, 3)),
        Error(f"{op}{floats}, got int64", (x.long(), cu, n, 3)),
        Error(f"{op}cu_seqlens of shape (V+1,), got (0,)", (x, cu[:0], n, 3)),
        Error(f"{op}cu_seqlens of dtype int64, got int32", (x, cu.int(), n, 3)),
        Error(f"{op}tokens_per_frame of shape (V,), got ()", (x, cu, n[0], 3)),
        Error(f"{op}tokens_per_frame of shape (V,)=(2,), got (1,)", (x, cu, n[:1], 3)),
        Error(f"{op}frames >= 1, got 0", (x, cu, n, 0)),
        Error(f"{op}extra_rows >= 0, got -1", (x, cu, n, 3), {"extra_rows": -1}),
        Error(f"{op}weights of shape (S,), got (1, 15)", (x, cu, n, 3), {"weights": torch.ones(1, 15)}),
        Error(f"{op}weights of shape (S,)=(15,), got (14,)", (x, cu, n, 3), {"weights": torch.ones(14)}),
        Error(f"{op}weights of dtype float32, got float64", (x, cu, n, 3), {"weights": torch.ones(15).double()}),
        Error(f"{op}frames of at least the longest video's 3, got 2", (x, cu, n, 2), only_cpu=True),
        Error(
            f"{op}cu_seqlens ascending from 0 to at most S=15, got cu_seqlens[2]=16",
            (x, torch.tensor([0, 6, 16]), n, 3),
            only_cpu=True,
        ),
    ]


def host(kernels, tokens, cu_seqlens, tokens_per_frame, frames, *, weights=None, extra_rows=0, limit=160 << 10):
    """``limit``: bytes of shared memory, below which the costs go to a workspace."""
    (rows, D), words = tokens.shape, -(-frames // 64)
    curve, gain, opens = (poisoned((n,), t) for n, t in ((rows, torch.float32), (rows, torch.float32),
                                                         (rows * words, torch.int64)))  # fmt: skip
    if rows:
        getattr(kernels, f"run_curve_{str(tokens.dtype)[6:]}")(
            to_numpy(tokens), rows, D, D, to_numpy(cu_seqlens), to_numpy(tokens_per_frame), tokens_per_frame.shape[0],
            frames, None if weights is None else to_numpy(weights), extra_rows, curve, gain, opens,
            np.empty(WORKSPACE, np.uint8), limit,
        )  # fmt: skip
    return tuple(map(from_numpy, (curve, gain, opens)))


WORKSPACE = 48 << 20  # more than any of these tests needs; pages nobody touches take no memory


def sites_of(tokens, cu_seqlens, tokens_per_frame, extra_rows=0):
    """(entry of D(1), rows) of each site, the rows alone included."""
    cu, alone = cu_seqlens.tolist(), set(range(tokens.shape[0]))
    for (begin, end), n in zip(pairwise(cu), tokens_per_frame.tolist(), strict=True):
        t = max(0, end - begin - extra_rows) // n if n > 0 else 0
        for s in range(n if t else 0):
            rows = [begin + f * n + s for f in range(t)]
            alone -= set(rows)
            yield begin + s * t, rows
    yield from ((row, [row]) for row in alone)


def cost_table(x: torch.Tensor, w: torch.Tensor) -> list[list[float]]:
    """float64: what frames i to j of a site [T, D] cost as one run."""
    table = [[0.0] * len(x) for _ in x]
    for i, j in combinations(range(len(x)), 2):
        part, weight = x[i : j + 1], w[i : j + 1, None]
        if weight.sum() > 0:
            table[i][j] = float((weight * (part - (weight * part).sum(0) / weight.sum()).square()).sum())
    return table


def least_sums(cost: list[list[float]]) -> list[float]:
    """D(1), D(2), ... of a table of costs."""
    least, points = cost[0], [cost[0][-1]]
    for k in range(1, len(cost)):
        least = [min((least[i - 1] + cost[i][j] for i in range(k, j + 1)), default=math.inf) for j in range(len(cost))]
        points.append(least[-1])
    return points


def compare(got: tuple[torch.Tensor, ...], case: Case) -> None:
    """Bit for bit where sums are exact; else the runs, costed in float64, are within tolerance of the best ones."""
    assert len(got) == 3
    if case.name.startswith("exact"):
        for a, b in zip(got, outputs(ROOMS["run_curve"].reference(*case.args, **case.kwargs)), strict=True):
            assert same_bits(a, b), f"{case}:\n{a}\nexpected\n{b}"
    if case.name != "exact-planted":
        replay(got, *case.args, **case.kwargs)


def replay(got, tokens, cu_seqlens, tokens_per_frame, frames, *, weights=None, extra_rows=0) -> None:
    curve, gain, opens = got
    rows, words = tokens.shape[0], -(-frames // 64)
    assert curve.dtype == gain.dtype == torch.float32 and curve.shape == gain.shape == (rows,)
    assert opens.dtype == torch.int64 and opens.shape == (rows * words,)
    w = (torch.ones(rows) if weights is None else weights).double()
    for entry, members in sites_of(tokens, cu_seqlens, tokens_per_frame, extra_rows):
        t, x = len(members), tokens[members].double()
        points, gains = curve[entry : entry + t].tolist(), gain[entry : entry + t].tolist()
        masks = [[word & (2**64 - 1) for word in m] for m in opens.view(rows, words)[entry : entry + t].tolist()]
        cost = cost_table(x, w[members])
        best = least_sums(cost)
        spread = float((w[members, None] * (x - x[0]).square()).sum())
        tolerance = (8 + x.shape[1] / 16) * 2**-24 * spread * 1.01 + 1e-30
        for k in range(1, t + 1):
            starts = [f for f in range(t) if masks[k - 1][f // 64] >> f % 64 & 1]
            assert starts[0] == 0 and len(starts) == k and sum(m.bit_count() for m in masks[k - 1]) == k
            own = sum(cost[i][j - 1] for i, j in pairwise([*starts, t]))
            assert abs(points[k - 1] - best[k - 1]) <= tolerance and own <= best[k - 1] + 2 * tolerance
        assert points[-1] == 0 and all(a >= b for a, b in pairwise(points))
        assert gains[0] == math.inf and all(a >= b >= 0 for a, b in pairwise(gains))
        hull = [points[0] - sum(gains[1:k]) for k in range(1, t + 1)]
        slack = t * 2**-22 * points[0]
        assert all(h <= p + slack for h, p in zip(hull, points, strict=True)) and abs(hull[-1]) <= slack
        for k in range(1, t):  # where the gain falls the hull has a corner, which is a point
            assert gains[k] <= (gains[k + 1] if k + 1 < t else -1) or hull[k] >= points[k] - slack


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 2), st.booleans(), st.integers(0, 99))
def test_every_way_to_cut(host_kernels, t, n, extra, weighted, seed):
    """D(k) is the least over all cuttings into k runs, on every backend, and masks are the earliest of the best."""
    rows = t * n + extra
    x = torch.randint(-2, 3, (rows, 2), generator=generator("cut", t, n, seed)).float()
    w = torch.randint(1, 4, (rows,), generator=generator("w", seed)).float() if weighted else None
    args, kw = (x, *layout((rows, n)), t), {"weights": w, "extra_rows": extra}
    want = ROOMS["run_curve"].reference(*args, **kw)
    for got in (run_curve(*args, **kw), host(host_kernels, *args, **kw), host(host_kernels, *args, **kw, limit=0)):
        assert all(map(same_bits, got, want))
    replay(want, *args, **kw)
    for entry, members in sites_of(x, *args[1:3], extra):
        cost = cost_table(x[members].double(), torch.ones(t) if w is None else w[members].double())
        for k in range(1, len(members) + 1):
            cuts = [(0, *c, len(members)) for c in combinations(range(1, len(members)), k - 1)]
            least = min(sum(cost[i][j - 1] for i, j in pairwise(cut)) for cut in cuts)
            assert abs(float(want[0][entry + k - 1]) - least) <= 1e-5 * (1 + least)


def test_ties_open_the_last_run_as_early_as_can_be():
    x = torch.tensor([0.0, 0, 0, 0])[:, None]
    curve, gain, opens = run_curve(x, *layout((4, 1)), 4)
    assert curve.tolist() == [0] * 4 and gain.tolist() == [math.inf, 0, 0, 0]
    assert opens.tolist() == [0b1, 0b11, 0b111, 0b1111]
    x = torch.tensor([0.0, 1, 2, 3])[:, None]  # 0 | 1 2 3 and 0 1 2 | 3 cost 2, 0 1 | 2 3 costs 1
    assert run_curve(x, *layout((4, 1)), 4)[2].tolist() == [0b1, 0b101, 0b111, 0b1111]


def test_the_hull_spreads_what_two_runs_gain_together():
    """A bump in the middle: one cut gains little, two gain all."""
    x = torch.tensor([0.0, 0, 0, 8, 0, 0, 0])[:, None]
    curve, gain, _ = run_curve(x, *layout((7, 1)), 7)
    assert curve[2] == 0 and gain[1] == gain[2] == curve[0] / 2 > curve[0] - curve[1]


@pytest.mark.parametrize("t", [300, 330])
def test_long_videos(host_kernels, t):
    """More frames than a block has threads, five words; in shared memory and beyond it."""
    x = whole_numbers(t, 2)
    args = (x, *layout((t, 1)), t)
    want = run_curve(*args)
    for limit in (227 << 10, 0):
        assert all(map(same_bits, host(host_kernels, *args, limit=limit), want))
    assert all(map(same_bits, ROOMS["run_curve"].reference(*args), want))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_drifts_and_what_is_far_from_zero(host_kernels, offset, dtype):
    """The first row is subtracted first: a common offset costs no digits."""
    x = (randn((48, 40), torch.float32, "drift").cumsum(0) + offset).to(dtype)
    args = (x, *layout((48, 2)), 24)
    for got in (run_curve(*args), host(host_kernels, *args)):
        replay(got, *args)


def test_a_video_is_alone_in_its_batch():
    x = clip(33, torch.float32, 60)
    cu, n = layout((24, 3), (36, 2))
    whole = run_curve(x, cu, n, 18)
    for v, t in enumerate((8, 18)):
        part = slice(int(cu[v]), int(cu[v + 1]))
        alone = run_curve(x[part], *layout((part.stop - part.start, int(n[v]))), t)
        assert all(same_bits(a[part], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    args = (randn((700, 20), torch.float32, "threads"), *layout((640, 80), (60, 3)), 20)
    want, before = run_curve(*args), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(same_bits, run_curve(*args), want))
    finally:
        torch.set_num_threads(before)


BAD = st.sampled_from([-(2**63), -7, -1, 0, 1, 5, 30, 40, 41, 2**63 - 1])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(BAD, BAD), min_size=1, max_size=5), st.integers(0, 3), st.sampled_from([1, 4, 70]))
def test_no_layout_leads_outside_a_tensor(host_kernels, videos, extra, frames):
    """CUDA cannot look at the values without a sync: whatever they are, only rows of the tensors are touched."""
    words = -(-frames // 64)
    curve, gain = np.full(42, 7, np.float32), np.full(42, 7, np.float32)
    opens = np.full(40 * words + 2, 7, np.int64)
    cu, n = (np.array(x, np.int64) for x in zip(*videos, strict=True))
    host_kernels.run_curve_float32(
        to_numpy(randn((40, 6), torch.float32)), 40, 6, 6, cu, n[1:], len(videos) - 1, frames, None, extra,
        curve[1:-1], gain[1:-1], opens[1:-1], np.empty(WORKSPACE, np.uint8), 160 << 10,
    )  # fmt: skip
    assert curve[0] == curve[-1] == gain[0] == gain[-1] == opens[0] == opens[-1] == 7


def test_more_than_2_31_elements():
    """Row offsets are 64-bit: a strided view whose last row lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16))  # pages nobody touches take no memory
    rows = buffer.as_strided((3, 32), (2**30, 1))
    rows[:] = randn((3, 32), torch.float16, "far")
    assert all(map(same_bits, run_curve(rows, *layout((3, 1)), 3), run_curve(rows.clone(), *layout((3, 1)), 3)))
