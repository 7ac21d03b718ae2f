"""motion_gate: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok.ops import _canonical, _patch
from vtok.ops._rooms import ROOMS

from patches import PIXELS, bytes_of, planted, video
from rooms import Case, Error, from_numpy, generator, outputs, poisoned, same_bits, strided, to_numpy

gate = vtok.ops.motion_gate
METRICS = ("l1", "mse", "l2", "ssim")


def threshold(frames: torch.Tensor, patch, tubelet: int = 1, *, metric="l1", span="ends", **_) -> float:
    """Half of the patches move further from one step to the next."""
    scores = ROOMS["patch_motion"].reference(frames, list(patch), tubelet, metric=metric, span=span, pad=True)
    scores = scores[scores.isfinite()]
    return float(scores.median()) if len(scores) else 1.0


def forced(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator("forced", shape)) < 0.2


def state(frames: torch.Tensor, tubelet: int, *steps: int) -> dict[str, torch.Tensor]:
    B, _, C, H, W = frames.shape
    return {
        "state_frames": video((B, C, tubelet, H, W), frames.dtype, "state"),
        "state_step": torch.tensor(steps, dtype=torch.int64),
    }


def case(name: str, frames: torch.Tensor, patch: tuple[int, int], limit: float | None = None, **kwargs) -> Case:
    limit = threshold(frames, patch, **kwargs) if limit is None else limit
    return Case(name, (frames,), {"patch": list(patch), "threshold": limit, **kwargs})


def cases() -> list[Case]:
    cut = {"tubelet": 2, "span": "whole", "pad": True}
    pairs = [(m, d) for m in METRICS for d in (torch.uint8, torch.float32)]
    pairs += [("l1", torch.bfloat16), ("ssim", torch.float16)]
    two = video((2, 6, 2, 6, 9), torch.float32, "two")
    return [
        *(case(f"cut-{m}-{str(d)[6:]}", video((2, 6, 2, 6, 9), d), (4, 7), metric=m, **cut) for m, d in pairs),
        case("previous", two, (3, 3), reference="previous", refresh=3),
        case("previous-ends", two, (3, 3), reference="previous", tubelet=3, **state(two, 3, 4, 0)),
        case("ends", two, (2, 3), tubelet=2, refresh=2, **state(two, 2, 1, 5)),
        case("forced-steps", two, (3, 9), forced=forced(2, 6)),
        case("forced-patches", two, (3, 3), forced=forced(2, 6, 2, 3), **state(two, 1, 0, 7)),
        case("all", two, (6, 9), 0.0, refresh=1),
        case("none", two, (6, 9), 1e30, **state(two, 1, 1, -3)),
        *(case(f"planted-{m}", planted(), (4, 4), metric=m, refresh=3) for m in METRICS),
        case("several-strips", video((1, 3, 1, 4, 1100), torch.uint8), (2, 14), pad=True),
        case("one-pixel", video((1, 4, 1, 2, 300), torch.bfloat16), (1, 1)),
        case("float64", video((1, 4, 2, 6, 10), torch.float64), (3, 5)),
        case("no-frames", two[:, :0], (3, 3), **state(two, 1, 3, 0)),
        case("no-frames-yet", two[:, :0], (3, 3), tubelet=2),
        case("no-videos", two[:0], (3, 3)),
    ]


def errors() -> list[Error]:
    x = torch.zeros(2, 6, 3, 8, 12)
    op = "vtok::motion_gate: expected "
    full = {"state_frames": torch.zeros(2, 3, 1, 8, 12), "state_step": torch.zeros(2, dtype=torch.int64)}
    bad = [
        (f"{op}forced of dtype bool, got float32", {"forced": torch.zeros(2, 6)}),
        (
            f"{op}forced of shape (B, T')=(2, 6) or (B, T', h, w)=(2, 6, 2, 3), got (2, 6, 3, 2)",
            {"forced": torch.zeros(2, 6, 3, 2, dtype=torch.bool)},
        ),
        (f"{op}state_frames and state_step together, got one of them", {"state_frames": full["state_frames"]}),
        (f"{op}state_frames of dtype float32, got float16", full | {"state_frames": full["state_frames"].half()}),
        (
            f"{op}state_frames of shape (B, C, tubelet, H, W)=(2, 3, 1, 8, 12), got (2, 1, 3, 8, 12)",
            full | {"state_frames": full["state_frames"].transpose(1, 2)},
        ),
        (f"{op}state_step of dtype int64, got int32", full | {"state_step": full["state_step"].int()}),
        (f"{op}state_step of shape (B,)=(2,), got (1,)", full | {"state_step": full["state_step"][:1]}),
    ]
    return [
        Error(f"{op}frames of shape (B, T, C, H, W), got (6, 3, 8, 12)", (x[0], [4, 4], 1.0)),
        Error(f"{op}(H, W) divisible by patch (4, 5) without pad, got (8, 12)", (x, [4, 5], 1.0)),
        Error(f"{op}threshold finite and >= 0, got -1", (x, [4, 4], -1.0)),
        Error(f"{op}threshold finite and >= 0, got nan", (x, [4, 4], math.nan)),
        Error(f"{op}threshold finite and >= 0, got inf", (x, [4, 4], math.inf)),
        Error(f'{op}reference of "previous" or "last_kept", got "first"', (x, [4, 4], 1.0), {"reference": "first"}),
        Error(f"{op}refresh >= 0, got -1", (x, [4, 4], 1.0), {"refresh": -1}),
        *(Error(message, (x, [4, 4], 1.0), kwargs, only_cpu=True) for message, kwargs in bad),
    ]


def host(
    kernels, frames, patch, threshold, tubelet=1, *, metric="l1", span="ends", reference="last_kept", refresh=0,
    pad=False, forced=None, state_frames=None, state_step=None,
):  # fmt: skip
    B, T, h, w = _patch.grid(frames, patch, tubelet)
    frames = frames.contiguous()
    _, _, C, H, W = frames.shape
    keep, step = poisoned((B, T, h, w), torch.uint8), poisoned((B,), torch.int64)
    score = poisoned((B, T, h, w), _canonical.accumulator(frames.dtype))
    state = poisoned((B, C, tubelet, H, W), frames.dtype)
    if T == 0 and state_frames is None:
        state[:] = 0
    given = [None if x is None else to_numpy(x) for x in (forced, state_frames, state_step)]
    getattr(kernels, f"motion_gate_{str(frames.dtype)[6:]}")(
        to_numpy(frames), *frames.stride()[:4], B, T, C, H, W, tubelet, *patch, span == "whole", METRICS.index(metric),
        threshold, reference == "previous", refresh, given[0], forced is not None and forced.dim() == 4, *given[1:],
        keep, score, state, step,
    )  # fmt: skip
    return from_numpy(keep).bool(), from_numpy(score), from_numpy(state, frames.dtype), from_numpy(step)


def equal(a, b) -> bool:
    return all(map(same_bits, outputs(a), outputs(b)))


def test_drift_adds_up_against_the_last_kept():
    """20 frames, each 0.0485 from the one before in l2: none passes 0.3 alone, every seventh does against the last."""
    frames = (torch.arange(20.0) * 0.0485)[None, :, None, None, None]
    assert gate(frames, [1, 1], 0.3, metric="l2", reference="previous")[0].sum() == 1
    assert gate(frames, [1, 1], 0.3, metric="l2")[0].flatten().nonzero().flatten().tolist() == [0, 7, 14]


def test_by_hand():
    """One patch: scores against the last kept pixel, strictly above 1; forced and refreshed steps are kept anyway."""
    values = torch.tensor([0.0, 1.0, 1.5, 2.0, 3.0, 3.0, 3.0])[None, :, None, None, None]
    keep, score, frames, step = gate(values, [1, 1], 1.0)
    assert keep.flatten().int().tolist() == [1, 0, 1, 0, 1, 0, 0]
    assert score.flatten().tolist() == [math.inf, 1, 1.5, 0.5, 1.5, 0, 0]
    assert (frames.item(), step.item()) == (3.0, 7)
    keep, score, _, _ = gate(values, [1, 1], 1.0, refresh=3, forced=torch.arange(7)[None] == 5)
    assert keep.flatten().int().tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert score.flatten().tolist() == [math.inf, 1, 1.5, 0.5, 1, 1, 0]


def test_scores_of_previous_are_those_of_patch_motion():
    for dtype in PIXELS:
        x = video((2, 6, 3, 12, 16), dtype, "previous")
        for metric in METRICS:
            limit = threshold(x, [4, 8], 2, metric=metric, span="whole")
            keep, score, _, _ = gate(x, [4, 8], limit, 2, metric=metric, span="whole", reference="previous")
            want = vtok.ops.patch_motion(x, [4, 8], 2, metric=metric, span="whole")
            assert same_bits(score, want)
            assert torch.equal(keep, want > limit)
            assert 0 < keep[:, 1:].float().mean() < 1


@pytest.mark.parametrize("span", ["ends", "whole"])
@pytest.mark.parametrize("reference", ["previous", "last_kept"])
@pytest.mark.parametrize("tubelet", [1, 2])
def test_chunks_are_the_whole(tubelet, reference, span):
    """Cut at every point into two, and into single steps with empty chunks between."""
    x = video((2, 7 * tubelet, 2, 6, 9), torch.uint8, "chunks")
    only = forced(2, 7, 2, 3)
    kwargs = {"tubelet": tubelet, "reference": reference, "span": span, "refresh": 5, "pad": True, "metric": "l2"}

    def run(*lengths: int):
        keeps, scores, passed, t = [], [], {}, 0
        for n in lengths:
            chunk = x[:, t * tubelet : (t + n) * tubelet]
            keep, score, frames, step = gate(chunk, [4, 3], 150.0, forced=only[:, t : t + n], **kwargs, **passed)
            passed, t = {"state_frames": frames, "state_step": step}, t + n
            keeps.append(keep)
            scores.append(score)
        return torch.cat(keeps, 1), torch.cat(scores, 1), frames, step

    whole = run(7)
    for cut in range(8):
        assert equal(run(cut, 7 - cut), whole)
    assert equal(run(1, 1, 0, 1, 1, 1, 0, 0, 1, 1), whole)


def test_a_row_starts_anew_where_its_step_is_zero():
    x = video((3, 4, 2, 4, 6), torch.float32, "anew")
    one = gate(x, [2, 3], 0.06)
    again = gate(x, [2, 3], 0.06, state_frames=one[2], state_step=one[3] * torch.tensor([1, 0, 1]))
    assert again[3].tolist() == [8, 4, 8]
    assert (again[1][:, 0] == math.inf).all((1, 2)).tolist() == [False, True, False]
    for a, b in zip(again, one, strict=True):
        assert same_bits(a[1], b[1])


def test_inputs_are_not_changed():
    x = video((1, 3, 1, 4, 4), torch.float32, "unchanged")
    given = state(x, 1, 2)
    before = {key: value.clone() for key, value in given.items()}
    _, _, frames, step = gate(x[:, :0], [2, 2], 0.06, **given)
    assert all(torch.equal(given[key], before[key]) for key in given)
    assert torch.equal(frames, given["state_frames"])
    assert frames.data_ptr() != given["state_frames"].data_ptr()
    assert step.tolist() == [2]


def test_nan_never_passes_but_is_refreshed():
    x = torch.zeros(1, 6, 1, 1, 1)
    x[0, 2] = math.nan
    keep, score, _, _ = gate(x, [1, 1], 0.0)
    assert keep.flatten().int().tolist() == [1, 0, 0, 0, 0, 0]
    assert score.flatten().isnan().int().tolist() == [0, 0, 1, 0, 0, 0]
    keep, score, _, _ = gate(x, [1, 1], 0.0, refresh=2)
    assert keep.flatten().int().tolist() == [1, 0, 1, 0, 1, 0]
    assert score.flatten().isnan().int().tolist() == [0, 0, 1, 1, 1, 0]


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*(st.integers(low, high) for low, high in ((1, 2), (0, 5), (1, 2), (1, 12), (1, 30)))),
    st.integers(1, 12),
    st.integers(1, 30),
    st.integers(1, 2),
    st.sampled_from(METRICS),
    st.sampled_from(["ends", "whole"]),
    st.sampled_from(["previous", "last_kept"]),
    st.sampled_from(PIXELS),
    st.integers(0, 3),
    st.sampled_from([None, (0, 0), (3, 0), (1, 4)]),
)
def test_any_sizes(host_kernels, shape, ph, pw, tubelet, metric, span, reference, dtype, refresh, steps):
    (B, T, C, H, W), patch = shape, [min(ph, shape[3]), min(pw, shape[4])]
    x = video((B, T * tubelet, C, H, W), dtype, "any")
    kwargs = {"metric": metric, "span": span, "pad": True, "reference": reference, "refresh": refresh}
    kwargs |= {} if steps is None else state(x, tubelet, *steps[:B])
    args = (x, patch, threshold(x, patch, tubelet, **kwargs), tubelet)
    want = ROOMS["motion_gate"].reference(*args, **kwargs)
    assert equal(gate(*args, **kwargs), want)
    assert equal(host(host_kernels, *args, **kwargs), want)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads):
    x = video((2, 5, 3, 48, 640), torch.float32, "threads")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert equal(gate(x, [24, 32], 0.06), ROOMS["motion_gate"].reference(x, [24, 32], 0.06))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_patch_wider_than_a_tile(host_kernels, dtype):
    x = video((1, 5, 2, 3, 1300), dtype, "wide")
    for patch in ([3, 650], [3, 1300]):
        args = (x, patch, threshold(x, patch))
        want = ROOMS["motion_gate"].reference(*args)
        assert equal(gate(*args), want)
        assert equal(host(host_kernels, *args), want)


def test_strided_states_and_forced():
    x = video((2, 4, 2, 4, 6), torch.float32, "strided")
    given = state(x, 1, 3, 5) | {"forced": forced(2, 4, 2, 2)}
    apart = {key: strided(value) for key, value in given.items()}
    assert equal(gate(x, [2, 3], 0.06, **apart), gate(x, [2, 3], 0.06, **given))


def test_more_than_2_31_elements():
    """Offsets are 64-bit: a strided view whose last frame lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.uint8))  # pages nobody touches take no memory
    frames = buffer.as_strided((1, 3, 1, 4, 8), (0, 2**30, 0, 8, 1))
    frames[:] = bytes_of((1, 3, 1, 4, 8), "far")
    assert equal(gate(frames, [2, 4], 80.0), gate(frames.clone(), [2, 4], 80.0))
