"""patch_motion: what only it promises. The contract tests run over cases() by themselves."""

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
from rooms import Case, Error, from_numpy, poisoned, randn, same_bits, strided, to_numpy

motion = vtok.ops.patch_motion
METRICS = ("l1", "mse", "l2", "ssim")


def case(name: str, frames: torch.Tensor, patch: tuple[int, int], **kwargs) -> Case:
    return Case(name, (frames,), {"patch": list(patch), **kwargs})


def cases() -> list[Case]:
    cut = {"tubelet": 2, "span": "whole", "pad": True}
    tall = torch.tensor([0, 255, 3], dtype=torch.uint8)[None, :, None, None, None].expand(1, 3, 1, 300, 2)
    pairs = [(m, d) for m in METRICS for d in (torch.uint8, torch.float32)]
    pairs += [("ssim", torch.float16), ("ssim", torch.bfloat16)]
    return [
        *(case(f"cut-{m}-{str(d)[6:]}", video((2, 4, 2, 6, 9), d), (4, 7), metric=m, **cut) for m, d in pairs),
        *(case(f"{d}".removeprefix("torch."), video((1, 3, 3, 32, 48), d), (16, 16)) for d in PIXELS),
        case("ends", video((2, 6, 2, 8, 12), torch.float32), (4, 4), tubelet=3, metric="l2"),
        case("several-strips", video((1, 3, 1, 4, 1100), torch.uint8), (2, 14), pad=True),
        case("several-strips-bfloat16", video((1, 3, 1, 4, 700), torch.bfloat16), (4, 10), metric="ssim"),
        case("several-runs", video((2, 20, 1, 4, 6), torch.float16), (4, 3)),
        case("one-pixel", video((2, 3, 2, 3, 5), torch.float32), (1, 1), metric="ssim"),
        *(case(f"planted-{m}", planted(), (4, 4), metric=m) for m in METRICS),
        case("float64", video((1, 3, 2, 6, 10), torch.float64), (3, 5)),
        case("float64-ssim", video((1, 3, 2, 6, 10), torch.float64), (3, 5), metric="ssim"),
        *(case(f"tall-{m}", tall, (300, 2), metric=m) for m in ("l1", "ssim")),
        case("one-step", video((2, 2, 1, 4, 4), torch.uint8), (2, 2), tubelet=2),
        case("no-frames", torch.empty(2, 0, 3, 4, 4), (2, 2)),
        case("no-videos", torch.empty(0, 4, 3, 4, 4, dtype=torch.uint8), (2, 2)),
    ]


def grad_cases() -> list[Case]:
    frames = video((2, 4, 2, 5, 6), torch.float64, "grad").requires_grad_()
    return [
        *(case(m, frames, (2, 3), metric=m, pad=True) for m in METRICS),
        *(case(f"{m}-tubes", frames, (2, 3), metric=m, pad=True, tubelet=2, span="whole") for m in METRICS),
        case("ends", frames, (5, 3), tubelet=2),
    ]


def errors() -> list[Error]:
    x = torch.zeros(1, 6, 3, 8, 12)
    op = "vtok::patch_motion: expected "
    large = torch.zeros(1, 1, dtype=torch.uint8).expand(4097, 4096)[None, None, None]
    return [
        Error(f"{op}frames of shape (B, T, C, H, W), got (6, 3, 8, 12)", (x[0], [4, 4])),
        Error(f"{op}frames of dtype uint8, float32, float16, bfloat16 or float64, got int32", (x.int(), [4, 4])),
        Error(f"{op}frames with C, H and W >= 1, got (1, 6, 0, 8, 12)", (x[:, :, :0], [4, 4])),
        Error(f"{op}patch of 2 sizes (ph, pw), got 1", (x, [4])),
        Error(f"{op}patch from (1, 1) to (H, W)=(8, 12), got (0, 4)", (x, [0, 4])),
        Error(f"{op}patch from (1, 1) to (H, W)=(8, 12), got (9, 4)", (x, [9, 4]), {"pad": True}),
        Error(f"{op}(H, W) divisible by patch (4, 5) without pad, got (8, 12)", (x, [4, 5])),
        Error(f"{op}tubelet >= 1, got 0", (x, [4, 4], 0)),
        Error(f"{op}T divisible by tubelet=4, got 6", (x, [4, 4], 4)),
        Error(f'{op}metric of "l1", "mse", "l2" or "ssim", got "cos"', (x, [4, 4]), {"metric": "cos"}),
        Error(f'{op}span of "ends" or "whole", got "all"', (x, [4, 4]), {"span": "all"}),
        Error(
            f"{op}patches of at most 16777216 values for ssim of uint8, got 16781312",
            (large, [4097, 4096]),
            {"metric": "ssim"},
        ),
    ]


def host(kernels, frames, patch, tubelet=1, *, metric="l1", span="ends", pad=False):
    B, T, h, w = _patch.grid(frames, patch, tubelet)
    frames = frames.contiguous()
    scores = poisoned((B, T, h, w), _canonical.accumulator(frames.dtype))
    getattr(kernels, f"patch_motion_{str(frames.dtype)[6:]}")(
        to_numpy(frames), *frames.stride()[:4], B, T, *frames.shape[2:], tubelet, *patch, span == "whole",
        METRICS.index(metric), scores,
    )  # fmt: skip
    return from_numpy(scores)


def by_the_rule(x: torch.Tensor, r: torch.Tensor) -> np.float32:
    """Σ|x - r| of one patch [C, frames, ph, pw] of float32, one scalar operation at a time."""
    total = np.float32(0)
    for k in range(x.shape[-1]):
        column = np.float32(0)
        for a, b in zip(x[..., k].flatten().numpy(), r[..., k].flatten().numpy(), strict=True):
            column = column + np.abs(a - b)
        total = total + column
    return total


def test_the_order_of_sums():
    x = randn((1, 4, 3, 5, 7), torch.float32, "order")
    steps = _patch.steps(x, 2)
    got = ROOMS["patch_motion"].reference(x, [5, 7], 2, span="whole")[0, 1, 0, 0]
    assert float(got) == float(by_the_rule(steps[0, 1], steps[0, 0]) / np.float32(3 * 2 * 5 * 7))


@pytest.mark.parametrize("dtype", PIXELS)
def test_against_pooling(dtype):
    x = video((1, 6, 3, 32, 48), dtype, "pooling")
    exact = torch.nn.functional.avg_pool2d((x[0, 1:].double() - x[0, :-1].double()).abs().mean(1), 16)
    torch.testing.assert_close(motion(x, [16, 16])[0, 1:].double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_bytes_score_as_the_floats_of_their_values(metric):
    """Integers are summed exactly; so are their float64 values, up to the last rounding."""
    x = bytes_of((2, 4, 3, 16, 24), metric)
    want = motion(x.double(), [8, 8], metric=metric)
    torch.testing.assert_close(motion(x, [8, 8], metric=metric).double(), want, rtol=3e-6, atol=1e-7)


def test_ssim_of_known_patches():
    """Values that GRT's own function returns."""
    pairs = [([0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0], 0.99960016), ([0, 0.25, 0.5, 1], [0, 0.25, 0.5, 0.75], 0.0654402)]
    for r, x, want in pairs:
        frames = torch.tensor([r, x]).view(1, 2, 1, 1, 4)
        assert float(motion(frames, [1, 4], metric="ssim")[0, 1]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [*PIXELS, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_a_static_clip_scores_zero(dtype, metric):
    frames = video((1, 1, 3, 15, 21), dtype, "static").expand(1, 4, 3, 15, 21)
    scores = motion(frames, [5, 7], metric=metric)
    assert (scores[:, 0] == math.inf).all()
    assert (scores[:, 1:].abs() <= (1e-6 if metric == "ssim" else 0)).all()


def test_nan_and_infinity_stay_in_their_patches():
    for metric in METRICS:
        scores = motion(planted(), [4, 4], metric=metric)[0, :, 0]
        assert scores[1:3, 0].isnan().all()
        assert scores[3, 0].isfinite()
        assert scores[3, 1].isnan() if metric == "ssim" else scores[3, 1] == math.inf
        assert scores[2, 2].isnan()  # infinity against itself
        assert scores[1:, 5:].isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_padding_is_zeros(metric, dtype):
    x = video((1, 3, 2, 10, 13), dtype, "pad")
    whole = torch.nn.functional.pad(x, (0, 3, 0, 6))
    assert same_bits(motion(x, [8, 8], metric=metric, pad=True), motion(whole, [8, 8], metric=metric))


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*(st.integers(low, high) for low, high in ((1, 2), (1, 5), (1, 3), (1, 20), (1, 40)))),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from(METRICS),
    st.sampled_from(["ends", "whole"]),
    st.sampled_from(PIXELS),
)
def test_any_sizes(host_kernels, shape, ph, pw, tubelet, metric, span, dtype):
    (B, T, C, H, W), patch = shape, [min(ph, shape[3]), min(pw, shape[4])]
    x = video((B, T * tubelet, C, H, W), dtype, "any")
    kwargs = {"metric": metric, "span": span, "pad": True}
    want = ROOMS["patch_motion"].reference(x, patch, tubelet, **kwargs)
    assert same_bits(motion(x, patch, tubelet, **kwargs), want)
    assert same_bits(host(host_kernels, x, patch, tubelet, **kwargs), want)
    for b in range(B):
        assert same_bits(motion(x[b : b + 1], patch, tubelet, **kwargs), want[b : b + 1])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_a_walk_anywhere(threads):
    x = video((1, 13, 3, 48, 640), torch.float32, "threads")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_bits(motion(x, [24, 32]), ROOMS["patch_motion"].reference(x, [24, 32]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_patch_wider_than_a_tile(host_kernels, dtype, metric):
    """Its columns are taken in several tiles, whose totals go on from one another; on CUDA nothing is staged."""
    x = video((1, 3, 2, 9, 1300), dtype, "wide")
    for patch in ([9, 650], [3, 1300]):
        want = ROOMS["patch_motion"].reference(x, patch, metric=metric)
        assert same_bits(motion(x, patch, metric=metric), want)
        assert same_bits(host(host_kernels, x, patch, metric=metric), want)


@pytest.mark.parametrize("metric", METRICS)
def test_tall_patches_of_bytes(host_kernels, metric):
    """Sums in narrow lanes settle before they are full: the largest differences over many rows."""
    x = bytes_of((1, 2, 1, 4300, 4), "tall")
    x[0, 0, 0, :, 0], x[0, 1, 0, :, 0] = 0, 255
    want = ROOMS["patch_motion"].reference(x, [4300, 2], metric=metric)
    assert same_bits(motion(x, [4300, 2], metric=metric), want)
    assert same_bits(host(host_kernels, x, [4300, 2], metric=metric), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("column", [1, 2])
def test_unaligned_rows(host_kernels, dtype, column):
    """Frames that begin off a word's boundary are read in shorter words, or pixel by pixel."""
    wide = video((1, 3, 2, 8, 20), dtype, "unaligned")
    want, scores = motion(wide[..., column : column + 16], [4, 8]), poisoned((1, 3, 2, 2), torch.float32)
    flat = to_numpy(wide).reshape(-1)[column:]
    getattr(host_kernels, f"patch_motion_{str(dtype)[6:]}")(
        flat, *wide.stride()[:4], 1, 3, 2, 8, 16, 1, 4, 8, False, 0, scores
    )
    assert same_bits(from_numpy(scores), want)


def test_views_of_frames():
    """Channels last, a cropped video, every second frame: read where they are, or copied, with one result."""
    x = video((2, 6, 3, 16, 24), torch.float32, "views")
    last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for view in (last, x[:, ::2, :, 2:14, 3:19], strided(x), x.transpose(0, 1)):
        pad = {"pad": True}
        assert same_bits(motion(view, [4, 8], **pad), motion(view.contiguous(), [4, 8], **pad))


def test_gradient_of_a_static_patch_is_zero():
    x = torch.ones(1, 3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    motion(x, [2, 2], metric="l2")[:, 1:].sum().backward()
    assert x.grad.tolist() == torch.zeros_like(x).tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_gradient_in_the_dtype_of_frames(metric):
    x = video((1, 4, 2, 6, 6), torch.bfloat16, "dtype").requires_grad_()
    exact = x.detach().double().requires_grad_()
    for frames in (x, exact):
        motion(frames, [3, 3], metric=metric)[:, 1:].sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=3e-2, atol=4e-2)


def test_gradient_inside_a_compiled_graph():
    x = video((1, 4, 2, 6, 6), torch.float32, "compiled").requires_grad_()
    run = torch.compile(lambda x: motion(x, [3, 3], metric="ssim")[:, 1:].sum(), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(run(x), x)
    (want,) = torch.autograd.grad(motion(x, [3, 3], metric="ssim")[:, 1:].sum(), x)
    torch.testing.assert_close(got, want)


def test_more_than_2_31_elements():
    """Offsets are 64-bit: a strided view whose last frame lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.uint8))  # pages nobody touches take no memory
    frames = buffer.as_strided((1, 3, 1, 4, 8), (0, 2**30, 0, 8, 1))
    frames[:] = bytes_of((1, 3, 1, 4, 8), "far")
    assert same_bits(motion(frames, [2, 4]), motion(frames.clone(), [2, 4]))
