"""temporal_gate: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok.ops import _canonical
from vtok.ops._rooms import ROOMS

from rooms import FLOATS, Case, Error, from_numpy, poisoned, randn, same_bits, strided, to_numpy

gate = vtok.ops.temporal_gate
GOLDEN = Path(__file__).parents[1] / "golden"
REFERENCES = ("previous", "last_kept", "run_mean")


def layout(*videos: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """cu_seqlens, tokens_per_frame and sites of videos given as (rows, rows of a frame)."""
    cu = torch.tensor([0, *(rows for rows, _ in videos)]).cumsum(0)
    return cu, torch.tensor([n for _, n in videos] or [0])[: len(videos)], sum(max(0, n) for _, n in videos)


ONE = layout((15, 3))
# an incomplete last frame, an empty video, one frame, a frame longer than its video, no frames, sites of one row
RAGGED = layout((11, 4), (0, 5), (3, 3), (2, 7), (4, 0), (9, 1), (2, -1), (6, 2))


def clip(D: int, dtype: torch.dtype, rows: int = 40) -> torch.Tensor:
    """Rows near one another, so that some join: the cosine of two is about a half."""
    return (randn((1, D), torch.float32, "scene") + randn((rows, D), torch.float32, "clip")).to(dtype)


def planted() -> torch.Tensor:
    """Zeros, a repeated row, an opposite one, NaN, infinities, values whose squares overflow or vanish."""
    x = randn((15, 65), torch.float32, "planted")
    x[3], x[4], x[6] = 0, x[1], 0
    x[5] = -x[2]
    x[7, 3], x[8, 64], x[9, 0] = math.nan, math.inf, -math.inf
    x[10], x[11], x[12] = 3e19, 1e-30, -0.0
    return x


def state(sites: int, D: int, steps: list[int], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """As some call may have left it, with sites that no row has come to."""
    weight = torch.arange(sites).float() % 4
    return {"state_rows": clip(D, dtype, sites), "state_weight": weight, "state_step": torch.tensor(steps)}


def cases() -> list[Case]:
    steps = [3, 2, 0, 1, 4, 7, -2, 5]
    return [
        *(Case(f"ragged-{r}-{str(dtype)[6:]}", (clip(77, dtype), *RAGGED, 0.5), {"reference": r})
          for r in REFERENCES for dtype in FLOATS),
        *(Case(f"ragged-{D}-{r}", (clip(D, torch.bfloat16), *RAGGED, 0.5), {"reference": r})
          for D, r in ((1, "run_mean"), (513, "last_kept"), (512, "run_mean"))),
        *(Case(f"l2-{r}", (clip(66, torch.float16), *RAGGED, -11.5), {"metric": "l2", "reference": r})
          for r in REFERENCES),
        *(Case(f"state-{r}", (clip(77, torch.bfloat16), *RAGGED, 0.45),
               {"reference": r, "refresh": 3, **state(22, 77, steps)}) for r in REFERENCES),
        Case("state-l2", (clip(64, torch.float32), *RAGGED, -11.0), {"metric": "l2", **state(22, 64, steps)}),
        Case("state-float64", (clip(30, torch.float64), *RAGGED, 0.5),
             {"reference": "run_mean", **state(22, 30, steps, torch.float64)}),
        Case("1152", (clip(1152, torch.bfloat16, 15), *ONE, 0.5)),
        Case("refresh", (clip(8, torch.float32, 90), *layout((70, 3), (11, 5)), -2.0), {"refresh": 4}),
        *(Case(f"planted-{r}", (planted(), *ONE, 0.3), {"reference": r}) for r in REFERENCES),
        Case("planted-l2", (planted(), *ONE, -30.0), {"metric": "l2"}),
        Case("static", (clip(66, torch.float16, 1).expand(15, 66), *ONE, 0.99), {"reference": "run_mean"}),
        Case("eps", (clip(16, torch.float32), *RAGGED, 0.4), {"eps": 32.0}),
        Case("all", (clip(16, torch.float32), *RAGGED, math.inf), {"eps": 1e-6}),
        Case("first-frames", (clip(16, torch.float32), *RAGGED, -math.inf), {"eps": 1e-7}),
        Case("no-videos", (clip(8, torch.float32, 3), *layout(), 0.5)),
        Case("no-rows", (torch.empty(0, 8), *layout((0, 2)), 0.5), state(2, 8, [3])),
        Case("no-columns", (torch.empty(6, 0), *layout((6, 2)), 0.5), state(2, 0, [1])),
    ]  # fmt: skip


def errors() -> list[Error]:
    x, (cu, n, sites) = torch.randn(15, 7), layout((6, 2), (9, 3))
    op, old = "vtok::temporal_gate: expected ", state(5, 7, [1, 1])
    floats = "tokens of dtype float32, float16, bfloat16 or float64"

    def other(**changed):
        return {**old, **changed}

    return [
        Error(f"{op}tokens of shape (S, D), got (7,)", (x[0], cu, n, sites, 0.5)),
        Error(f"{op}{floats}, got int64", (x.long(), cu, n, sites, 0.5)),
        Error(f"{op}cu_seqlens of shape (V+1,), got (0,)", (x, cu[:0], n, sites, 0.5)),
        Error(f"{op}cu_seqlens of dtype int64, got int32", (x, cu.int(), n, sites, 0.5)),
        Error(f"{op}tokens_per_frame of shape (V,), got ()", (x, cu, n[0], sites, 0.5)),
        Error(f"{op}tokens_per_frame of shape (V,)=(2,), got (1,)", (x, cu, n[:1], sites, 0.5)),
        Error(f"{op}sites >= 0, got -1", (x, cu, n, -1, 0.5)),
        Error(f"{op}threshold to be a number, got nan", (x, cu, n, sites, math.nan)),
        Error(f'{op}reference of "previous", "last_kept" or "run_mean", got "first"', (x, cu, n, sites, 0.5),
              {"reference": "first"}),
        Error(f'{op}metric of "cosine" or "l2", got "l1"', (x, cu, n, sites, 0.5), {"metric": "l1"}),
        Error(f"{op}eps finite and >= 0, got -1", (x, cu, n, sites, 0.5), {"eps": -1.0}),
        Error(f"{op}refresh >= 0, got -3", (x, cu, n, sites, 0.5), {"refresh": -3}),
        Error(f"{op}state_rows, state_weight and state_step, or none, got 2 of them", (x, cu, n, sites, 0.5),
              other(state_step=None)),
        Error(f"{op}state_rows of shape (sites, D), got (7,)", (x, cu, n, sites, 0.5),
              other(state_rows=old["state_rows"][0])),
        Error(f"{op}state_rows of shape (sites, D)=(5, 7), got (4, 7)", (x, cu, n, sites, 0.5),
              other(state_rows=old["state_rows"][:4])),
        Error(f"{op}state_rows of dtype float32, got bfloat16", (x, cu, n, sites, 0.5),
              other(state_rows=old["state_rows"].bfloat16())),
        Error(f"{op}state_weight of shape (sites,)=(5,), got (3,)", (x, cu, n, sites, 0.5),
              other(state_weight=torch.ones(3))),
        Error(f"{op}state_weight of dtype float32, got int64", (x, cu, n, sites, 0.5),
              other(state_weight=torch.ones(5).long())),
        Error(f"{op}state_step of dtype int64, got int32", (x, cu, n, sites, 0.5), other(state_step=n.int())),
        Error(f"{op}state_step of shape (V,)=(2,), got (1,)", (x, cu, n, sites, 0.5), other(state_step=n[:1])),
        Error(f"{op}sites equal to the sum of tokens_per_frame=5, got 4", (x, cu, n, 4, 0.5), only_cpu=True),
        Error(f"{op}cu_seqlens ascending from 0 to at most S=15, got cu_seqlens[2]=16",
              (x, torch.tensor([0, 6, 16]), n, sites, 0.5), only_cpu=True),
    ]  # fmt: skip


def host(
    kernels, tokens, cu_seqlens, tokens_per_frame, sites, threshold, *, reference="last_kept", metric="cosine",
    eps=1e-8, refresh=0, state_rows=None, state_weight=None, state_step=None,
):  # fmt: skip
    (rows, D), dtype, videos = tokens.shape, _canonical.accumulator(tokens.dtype), tokens_per_frame.shape[0]
    keep, similarity = poisoned((rows,), torch.bool), poisoned((rows,), dtype)
    next_rows, next_weight = poisoned((sites, D), dtype), poisoned((sites,), torch.float32)
    next_step, workspace = poisoned((videos,), torch.int64), poisoned((videos + 1,), torch.int64)
    old = [None if x is None else to_numpy(x) for x in (state_rows, state_weight, state_step)]
    getattr(kernels, f"temporal_gate_{str(tokens.dtype)[6:]}")(
        to_numpy(tokens), rows, D, D, to_numpy(cu_seqlens), to_numpy(tokens_per_frame), videos, sites, threshold,
        reference == "previous", reference == "run_mean", metric == "l2", eps, refresh, *old,
        keep, similarity, next_rows, next_weight, next_step, workspace,
    )  # fmt: skip
    return tuple(from_numpy(x) for x in (keep.view(np.bool_), similarity, next_rows, next_weight, next_step))


def all_same(a, b) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def in_chunks(run, x, lengths: list[int], n: int, threshold: float, **kwargs):
    """One video of n sites in chunks of so many frames, the state handed on."""
    keeps, similarities, old = [], [], (None, None, None)
    for part in x.split([length * n for length in lengths]):
        states = dict(zip(("state_rows", "state_weight", "state_step"), old, strict=True))
        keep, similarity, *old = run(part, *layout((part.shape[0], n)), threshold, **kwargs, **states)
        keeps.append(keep)
        similarities.append(similarity)
    return torch.cat(keeps), torch.cat(similarities), *old


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("D", [1, 77, 513, 4097])
def test_previous_compares_as_temporal_similarity(D, metric):
    x, (cu, n, sites) = clip(D, torch.bfloat16), RAGGED
    scores = vtok.ops.temporal_similarity(x, cu, n, metric=metric)
    threshold = float(scores[scores.isfinite()].median())
    keep, similarity, *_ = gate(x, cu, n, sites, threshold, reference="previous", metric=metric)
    assert same_bits(similarity, scores)
    assert torch.equal(keep, ~(scores > threshold) & (torch.arange(40) < cu[-1]))
    assert D == 1 or 0 < (~keep[:37]).sum() < 37


@pytest.mark.parametrize("reference", REFERENCES)
def test_infinite_thresholds(reference):
    x, (cu, n, sites) = clip(9, torch.float32), RAGGED
    keep, similarity, *_ = gate(x, cu, n, sites, math.inf, reference=reference)
    assert torch.equal(keep, torch.arange(40) < cu[-1])
    keep, similarity, *_ = gate(x, cu, n, sites, -math.inf, reference=reference)
    assert torch.equal(keep, similarity.isinf() & (torch.arange(40) < cu[-1]))


def test_slow_drift():
    """Steps of 5 degrees: each is like the one before it, and after four of them unlike the row that was kept."""
    angle = torch.deg2rad(torch.arange(19) * 5.0)
    x, one = torch.stack([angle.cos(), angle.sin()], -1), layout((19, 1))
    threshold = math.cos(math.radians(18.5))
    assert gate(x, *one, threshold, reference="previous")[0].nonzero()[:, 0].tolist() == [0]
    assert gate(x, *one, threshold, reference="last_kept")[0].nonzero()[:, 0].tolist() == [0, 4, 8, 12, 16]
    # the mean of k rows lies (k - 1)·2.5 degrees on: a run of 7 is followed by a row 20 from it
    assert gate(x, *one, threshold, reference="run_mean")[0].nonzero()[:, 0].tolist() == [0, 7, 14]


@pytest.mark.parametrize("metric, threshold", [("cosine", 0.6), ("l2", -12.6)])
def test_run_mean_against_float64(metric, threshold):
    """Float64 re-runs the rule along the op's own choices; each must be right within the similarity's tolerance."""
    T, n, D = 30, 5, 96
    x = clip(D, torch.bfloat16, T * n)
    keep, similarity, rows, weight, step = gate(x, *layout((T * n, n)), threshold, reference="run_mean", metric=metric)
    for i in range(n):
        run: list[torch.Tensor] = []
        for t, row in enumerate(x.double()[i::n]):
            s = t * n + i
            if run:
                mean = torch.stack(run).mean(0)
                exact = torch.cosine_similarity(mean, row, dim=0) if metric == "cosine" else -(mean - row).norm()
                assert abs(float(exact) - float(similarity[s])) < 2e-5
                assert bool(keep[s]) == (not similarity[s] > threshold)
            run = [row] if keep[s] else [*run, row]
        assert weight[i] == len(run) and step.tolist() == [T]
        torch.testing.assert_close(rows[i].double(), torch.stack(run).sum(0), rtol=0, atol=1e-4)
    assert 10 < keep.sum() < T * n - 10


@pytest.mark.parametrize("reference", REFERENCES)
def test_ties_do_not_join(reference):
    """Similarities that equal the threshold: 3/5 as float32 rounds it, -5 and 1."""
    x = torch.tensor([[5.0, 0.0], [3.0, 4.0]])
    one = layout((2, 1))
    below = torch.nextafter(torch.tensor(0.6), torch.tensor(0.0)).item()
    assert gate(x, *one, 0.6, reference=reference)[0].tolist() == [True, True]
    assert gate(x, *one, below, reference=reference)[0].tolist() == [True, False]
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert gate(x, *one, -5.0, reference=reference, metric="l2")[0].tolist() == [True, True]
    assert gate(x, *one, -5.000001, reference=reference, metric="l2")[0].tolist() == [True, False]
    x = torch.ones(4, 3)
    assert gate(x, *layout((4, 1)), 1.0, reference=reference)[0].all()


@pytest.mark.parametrize("reference", REFERENCES)
def test_nan_never_joins(reference):
    x = torch.ones(5, 3)
    x[2, 1] = math.nan
    keep, similarity, *_ = gate(x, *layout((5, 1)), -math.inf, reference=reference)
    assert keep.tolist() == [True, False, True, True, False]
    assert similarity.isnan().tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("refresh", [0, 3])
@pytest.mark.parametrize("reference", REFERENCES)
def test_chunks_equal_one_piece(host_kernels, reference, refresh):
    """Split at every point, with a chunk of no frames between; and into single frames."""
    T, n = 12, 3
    x = clip(70, torch.bfloat16, T * n)
    options, threshold = {"reference": reference, "refresh": refresh}, {"run_mean": 0.6}.get(reference, 0.5)
    for run in (gate, lambda *args, **kwargs: host(host_kernels, *args, **kwargs)):
        whole = run(x, *layout((T * n, n)), threshold, **options)
        assert 0 < whole[0][n:].sum() < (T - 1) * n
        for t in range(T + 1):
            assert all_same(in_chunks(run, x, [t, 0, T - t], n, threshold, **options), whole)
        assert all_same(in_chunks(run, x, [1] * T, n, threshold, **options), whole)


def test_refresh_counts_from_the_start_of_the_stream():
    x = torch.ones(10, 2)
    keep, similarity, *_ = in_chunks(gate, x, [4, 1, 5], 1, 0.5, refresh=3)
    assert keep.nonzero()[:, 0].tolist() == [0, 3, 6, 9]
    assert (similarity[1:] == 1).all()


def test_one_video_of_a_batch_starts_anew():
    """What lies in the state of a video whose step is 0 is not looked at; the others go on."""
    x, sites = clip(20, torch.float32, 24), layout((12, 3), (12, 2))
    _, _, rows, weight, step = gate(x, *sites, 0.5)
    assert step.tolist() == [4, 6]
    rows[:3], weight[2], step[0] = math.nan, math.inf, 0
    keep, similarity, next_rows, _, next_step = gate(
        x, *sites, 0.5, state_rows=rows, state_weight=weight, state_step=step
    )
    fresh = gate(x[:12], *layout((12, 3)), 0.5)
    assert all_same((keep[:12], similarity[:12], next_rows[:3]), fresh[:3])
    assert next_step.tolist() == [4, 12]
    assert not similarity[12:].isinf().any()


def test_strides_of_the_state_do_not_matter():
    x, one, old = clip(20, torch.float32, 12), layout((12, 3)), state(3, 20, [2])
    apart = {name: strided(value) for name, value in old.items()}
    assert all_same(gate(x, *one, 0.5, **apart), gate(x, *one, 0.5, **old))


def test_the_state_given_is_left_as_it_is():
    x, old = clip(20, torch.float32, 12), state(3, 20, [2])
    before = {name: value.clone() for name, value in old.items()}
    gate(x, *layout((12, 3)), 0.5, reference="run_mean", **old)
    assert all(torch.equal(old[name], before[name]) for name in old)


def test_sites_that_no_row_has_come_to():
    """A frame cut short: its later sites have nothing to compare with, in the next chunk too."""
    x, one = clip(6, torch.float32, 9), layout((2, 3))
    keep, similarity, *old = gate(x[:2], *one, -2.0)
    assert old[0][2].tolist() == [0] * 6 and old[1].tolist() == [1, 1, 0] and old[2].tolist() == [1]
    states = dict(zip(("state_rows", "state_weight", "state_step"), old, strict=True))
    keep, similarity, *_ = gate(x[3:9], *layout((6, 3)), -2.0, **states)
    assert keep.tolist() == [False, False, True, False, False, False]
    assert similarity.isinf().tolist() == [False, False, True, False, False, False]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(-1, 9), st.integers(-1, 5)), max_size=5),
    st.integers(1, 70),
    st.integers(0, 9),
    st.sampled_from(REFERENCES),
    st.sampled_from([0, 2]),
)
def test_any_layout(host_kernels, videos, D, beyond, reference, refresh):
    """All of them equal the reference, and a video's result is the same alone as in the batch."""
    cu, n, sites = layout(*((rows, frame) for rows, frame, _ in videos))
    x = clip(D, torch.bfloat16, int(cu[-1]) + beyond)
    options = {"reference": reference, "refresh": refresh}
    old = state(sites, D, [step for *_, step in videos])
    old["state_step"] = old["state_step"].long()
    want = ROOMS["temporal_gate"].reference(x, cu, n, sites, 0.5, **options, **old)
    assert all_same(gate(x, cu, n, sites, 0.5, **options, **old), want)
    assert all_same(host(host_kernels, x, cu, n, sites, 0.5, **options, **old), want)
    site = 0
    for v, (rows, frame, _) in enumerate(videos):
        own, part = slice(site, site + max(frame, 0)), slice(int(cu[v]), int(cu[v + 1]))
        alone = gate(
            x[part], *layout((rows, frame)), 0.5, **options, state_rows=old["state_rows"][own],
            state_weight=old["state_weight"][own], state_step=old["state_step"][v : v + 1],
        )  # fmt: skip
        assert all_same(alone, (want[0][part], want[1][part], want[2][own], want[3][own], want[4][v : v + 1]))
        site = own.stop


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("reference", REFERENCES)
def test_threads_share_the_sites(threads, reference):
    x, one = clip(130, torch.float32, 1400), layout((400, 13), (900, 600), (100, 1))
    want = ROOMS["temporal_gate"].reference(x, *one, 0.5, reference=reference)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all_same(gate(x, *one, 0.5, reference=reference), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("dtype, D", [(torch.float16, 8193), (torch.float64, 4097)])
def test_rows_longer_than_a_block(host_kernels, dtype, D, reference):
    """On CUDA such a row is taken in parts, with the reference in next_rows."""
    x, one = clip(D, dtype, 7), layout((7, 1))
    old = state(1, D, [2], _canonical.accumulator(dtype)) | {"state_weight": torch.ones(1)}
    for states in ({}, old):
        want = ROOMS["temporal_gate"].reference(x, *one, 0.5, reference=reference, **states)
        assert all_same(gate(x, *one, 0.5, reference=reference, **states), want)
        assert all_same(host(host_kernels, x, *one, 0.5, reference=reference, **states), want)


BAD = st.sampled_from([-(2**63), -7, -1, 0, 1, 5, 30, 40, 41, 2**63 - 1])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(BAD, BAD, st.integers(-1, 2**40)), max_size=4), BAD, st.integers(0, 60))
def test_no_layout_leads_outside_a_tensor(host_kernels, videos, first, sites):
    """CUDA cannot look at the values without a sync: whatever they are, only rows of the tensors are touched."""
    cu = np.array([first, *(boundary for boundary, _, _ in videos)], dtype=np.int64)
    n = np.array([frame for _, frame, _ in videos] or [0], dtype=np.int64)
    steps = np.array([step for *_, step in videos] or [0], dtype=np.int64)
    outputs = [np.full(size + 4, 7, dtype) for size, dtype in (
        (40, np.uint8), (40, np.float32), (sites * 6, np.float32), (sites, np.float32), (len(videos), np.int64),
        (len(videos) + 1, np.int64),
    )]  # fmt: skip
    old = (np.ones((sites, 6), dtype=np.float32), np.ones(sites, dtype=np.float32), steps)
    host_kernels.temporal_gate_float32(
        to_numpy(clip(6, torch.float32)), 40, 6, 6, cu, n, len(videos), sites, 0.5, False, True, False, 1e-8, 2,
        *old, *(out[2:-2] for out in outputs),
    )  # fmt: skip
    assert all((out[[0, 1, -2, -1]] == 7).all() for out in outputs)
    assert set(outputs[0][2:-2]) <= {0, 1} and not (outputs[3][2:-2] == 7).any()


def test_sites_that_are_missing_or_too_many(host_kernels):
    """Where the sum cannot be seen: rows of sites that are missing are kept, sites that are too many stay empty."""
    x, (cu, n, _) = clip(6, torch.float32, 20), layout((12, 3), (8, 2))
    want = gate(x, cu, n, 5, 0.0)
    got = host(host_kernels, x, cu, n, 2, 0.0)
    assert same_bits(got[2], want[2][:2])
    scanned = (torch.arange(20) < 12) & (torch.arange(20) % 3 < 2)
    assert torch.equal(got[0], torch.where(scanned, want[0], True)) and not torch.equal(got[0], want[0])
    assert same_bits(got[1], torch.where(scanned, want[1], -math.inf))
    got = host(host_kernels, x, cu, n, 8, 0.0)
    assert all_same((*got[:2], got[2][:5], got[3][:5], got[4]), want)
    assert not got[2][5:].any() and not got[3][5:].any()


DTD = json.loads((GOLDEN / "tokens" / "dtd.json").read_text())["cases"]
DTD = {case["name"]: case for case in DTD if case["params"]["absolute"]}


@pytest.mark.parametrize("name", DTD)
def test_masks_of_timechat_online(name):
    """Dropped where more alike to the frame before than the threshold."""
    golden, params = np.load(GOLDEN / DTD[name]["file"], allow_pickle=False), DTD[name]["params"]
    n = params["h"] * params["w"]
    keep, *_ = gate(
        torch.from_numpy(golden["in_x"]), *layout((params["T"] * n, n)), params["threshold"], reference="previous"
    )
    assert (keep.numpy().reshape(params["T"], n) == golden["out_mask"]).all()


def test_more_than_2_31_elements():
    """Row offsets are 64-bit: a strided view whose last row lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16))  # pages nobody touches take no memory
    tokens = buffer.as_strided((3, 32), (2**30, 1))
    tokens[:] = clip(32, torch.float16, 3)
    one = layout((3, 1))
    assert all_same(gate(tokens, *one, 0.5), gate(tokens.clone(), *one, 0.5))
