"""motion_search: what only it promises. The contract tests run over cases() by themselves."""

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
from rooms import Case, Error, from_numpy, poisoned, randn, same_bits, to_numpy

search = vtok.ops.motion_search
room = ROOMS["motion_search"]
METRICS = ("l1", "mse", "l2")


def case(name: str, frames: torch.Tensor, patch: tuple[int, int], radius: int, **kwargs) -> Case:
    return Case(name, (frames,), {"patch": list(patch), "radius": radius, **kwargs})


def panned(shape: tuple[int, ...], dtype: torch.dtype, dy: int, dx: int, *seed) -> torch.Tensor:
    """Frames that show one still picture, each (dy, dx) further on."""
    B, T, C, H, W = shape
    picture = bytes_of((B, C, H + abs(dy) * (T - 1), W + abs(dx) * (T - 1)), "panned", *seed)
    at = [(t * abs(dy) if dy > 0 else (T - 1 - t) * abs(dy), t * abs(dx) if dx > 0 else (T - 1 - t) * abs(dx))
          for t in range(T)]  # fmt: skip
    return torch.stack([picture[:, :, y : y + H, x : x + W] for y, x in at], 1).to(dtype)


def beside_nan() -> torch.Tensor:
    """The patch in the middle came from the left; a vector to the right, tried later, meets NaN."""
    frames = video((1, 2, 1, 4, 12), torch.float32)
    frames[0, 1, :, :, 4:8] = frames[0, 0, :, :, 3:7] + 0.01
    frames[0, 0, :, :, 8] = math.nan
    return frames


def cases() -> list[Case]:
    cut = {"tubelet": 2, "span": "whole", "pad": True}
    flat = torch.full((1, 2, 1, 4, 8), 7, dtype=torch.uint8)
    stripes = flat * (torch.arange(8) % 2 + 3 * (torch.arange(2) % 2)[:, None, None, None])
    nearly = (28 * ((torch.arange(12) + torch.arange(2)[:, None, None, None]) % 2)).repeat(1, 1, 1, 2, 1).byte()
    nearly[:, 0, ..., 3] += 1
    alternating = flat * ((torch.arange(8) + torch.arange(2)[:, None, None, None]) % 2)
    return [
        *(case(f"{d}".removeprefix("torch."), video((1, 2, 2, 8, 12), d), (4, 4), 1) for d in PIXELS),
        *(case(f"cut-{m}", video((1, 4, 1, 4, 9), torch.float32, m), (3, 7), 1, metric=m, **cut) for m in METRICS),
        *(case(f"cut-{m}-uint8", video((2, 4, 1, 4, 9), torch.uint8), (3, 7), 1, metric=m, **cut) for m in METRICS),
        case("float64", video((1, 2, 1, 4, 10), torch.float64), (2, 5), 1, metric="l2", bias=0.01),
        case("ends", video((1, 6, 1, 4, 8), torch.float32), (2, 4), 1, tubelet=3),
        case("panned", panned((1, 2, 1, 8, 12), torch.uint8, 1, -2), (4, 4), 2),
        case("biased", panned((1, 2, 1, 4, 24), torch.uint8, 1, 0), (2, 4), 1, bias=12.5),
        case("never", video((1, 2, 1, 4, 8), torch.float32), (2, 4), 1, bias=1e300),
        case("ties", flat, (2, 4), 1),
        case("stripes", stripes.byte(), (2, 4), 2),
        case("alike-near-and-far", alternating.byte(), (2, 4), 3),
        case("better-after-good-enough", nearly, (2, 4), 1, bias=12.5),
        case("nan-beside-the-best", beside_nan(), (4, 4), 1),
        *(case(f"planted-{m}", planted(), (4, 4), 1, metric=m) for m in METRICS),
        case("still", video((2, 2, 1, 4, 6), torch.float16), (2, 3), 0),
        case("farther-than-the-frame", video((1, 2, 1, 2, 3), torch.bfloat16), (2, 2), 9, pad=True),
        case("several-strips", video((1, 2, 1, 3, 300), torch.uint8), (2, 14), 1, pad=True),
        case("one-step", video((2, 2, 1, 4, 4), torch.uint8), (2, 2), 1, tubelet=2),
        case("no-frames", torch.empty(2, 0, 3, 4, 4), (2, 2), 1),
        case("no-videos", torch.empty(0, 4, 3, 4, 4, dtype=torch.uint8), (2, 2), 1),
    ]


def errors() -> list[Error]:
    x = torch.zeros(1, 6, 3, 8, 12)
    op = "vtok::motion_search: expected "
    return [
        Error(f'{op}metric of "l1", "mse" or "l2", got "ssim"', (x, [4, 4], 1), {"metric": "ssim"}),
        Error(f"{op}frames of shape (B, T, C, H, W), got (6, 3, 8, 12)", (x[0], [4, 4], 1)),
        Error(f"{op}frames of dtype uint8, float32, float16, bfloat16 or float64, got int32", (x.int(), [4, 4], 1)),
        Error(f"{op}patch from (1, 1) to (H, W)=(8, 12), got (9, 4)", (x, [9, 4], 1), {"pad": True}),
        Error(f"{op}(H, W) divisible by patch (4, 5) without pad, got (8, 12)", (x, [4, 5], 1)),
        Error(f"{op}T divisible by tubelet=4, got 6", (x, [4, 4], 1, 4)),
        Error(f'{op}span of "ends" or "whole", got "all"', (x, [4, 4], 1), {"span": "all"}),
        Error(f"{op}radius >= 0, got -1", (x, [4, 4], -1)),
        Error(f"{op}bias finite and >= 0, got -0.5", (x, [4, 4], 1), {"bias": -0.5}),
        Error(f"{op}bias finite and >= 0, got nan", (x, [4, 4], 1), {"bias": math.nan}),
        Error(f"{op}bias finite and >= 0, got inf", (x, [4, 4], 1), {"bias": math.inf}),
    ]


def host(kernels, frames, patch, radius, tubelet=1, *, metric="l1", span="ends", bias=0.0, pad=False):
    B, T, h, w = _patch.grid(frames, patch, tubelet)
    frames, dtype = frames.contiguous(), _canonical.accumulator(frames.dtype)
    motion, vectors = poisoned((B, T, h, w), dtype), poisoned((B, T, h, w, 2), torch.int64)
    ry, rx = min(radius, frames.shape[3] - 1), min(radius, frames.shape[4] - 1)
    getattr(kernels, f"motion_search_{str(frames.dtype)[6:]}")(
        to_numpy(frames), *frames.stride()[:4], B, T, *frames.shape[2:], tubelet, *patch, span == "whole",
        METRICS.index(metric), ry, rx, room.rounded(bias, dtype), motion, vectors,
    )  # fmt: skip
    return from_numpy(motion), from_numpy(vectors)


def everywhere(kernels, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, after all backends were seen to return it."""
    want = room.reference(*args, **kwargs)
    for got in (search(*args, **kwargs), host(kernels, *args, **kwargs)):
        assert all(map(same_bits, got, want))
    return want


def by_the_rule(frames: torch.Tensor, patch: list[int], radius: int, metric: str, bias: float):
    """One patch and one vector after another, each distance by patch_motion of the two blocks alone."""
    (_, T, _, H, W), (ph, pw) = frames.shape, patch
    motion, vectors = torch.full((T, H // ph, W // pw), math.inf), torch.zeros(T, H // ph, W // pw, 2).long()
    for t, i, j in np.ndindex(T - 1, H // ph, W // pw):
        y, x = i * ph, j * pw
        found = []
        for dy in range(max(-radius, -y), min(radius, H - ph - y) + 1):
            for dx in range(max(-radius, -x), min(radius, W - pw - x) + 1):
                pair = [frames[0, t, :, y + dy : y + dy + ph, x + dx : x + dx + pw]]
                pair.append(frames[0, t + 1, :, y : y + ph, x : x + pw])
                cost = vtok.ops.patch_motion(torch.stack(pair)[None], patch, metric=metric)[0, 1, 0, 0].item()
                found.append((cost, abs(dy) + abs(dx), dy, dx))
        still = next(f for f in found if f[1] == 0)
        best = min([f for f in found if f[1]], default=still)
        chosen = best if np.float32(np.float32(best[0]) + np.float32(bias)) < still[0] else still
        motion[t + 1, i, j], vectors[t + 1, i, j] = chosen[0], torch.tensor(chosen[2:])
    return motion[None], vectors[None]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_the_rule(host_kernels, dtype, metric, bias):
    x = (panned((1, 3, 2, 8, 12), torch.uint8, 1, -1) // 40).to(dtype)  # few levels: many equal distances
    for got, want in zip(everywhere(host_kernels, x, [4, 3], 2, metric=metric, bias=bias),
                         by_the_rule(x, [4, 3], 2, metric, bias), strict=True):  # fmt: skip
        assert same_bits(got, want)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*(st.integers(low, high) for low, high in ((1, 2), (1, 4), (1, 2), (1, 14), (1, 30)))),
    st.integers(1, 14),
    st.integers(1, 30),
    st.integers(1, 2),
    st.integers(0, 3),
    st.sampled_from(METRICS),
    st.sampled_from(["ends", "whole"]),
    st.sampled_from([0.0, 0.01, 2.0]),
    st.sampled_from(PIXELS),
)
def test_any_sizes(host_kernels, shape, ph, pw, tubelet, radius, metric, span, bias, dtype):
    (B, T, C, H, W), patch = shape, [min(ph, shape[3]), min(pw, shape[4])]
    x = video((B, T * tubelet, C, H, W), dtype, "any")
    kwargs = {"metric": metric, "span": span, "bias": bias, "pad": True}
    motion, vectors = everywhere(host_kernels, x, patch, radius, tubelet, **kwargs)
    for b in range(B):
        alone = search(x[b : b + 1], patch, radius, tubelet, **kwargs)
        assert same_bits(alone[0], motion[b : b + 1]) and same_bits(alone[1], vectors[b : b + 1])


@pytest.mark.parametrize("dtype", [*PIXELS, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("span, tubelet", [("ends", 1), ("ends", 2), ("whole", 2)])
def test_radius_zero_is_patch_motion(dtype, metric, span, tubelet):
    x = video((2, 6, 3, 10, 27), dtype, "zero")
    kwargs = {"metric": metric, "span": span, "pad": True}
    motion, vectors = search(x, [4, 7], 0, tubelet, **kwargs)
    assert same_bits(motion, vtok.ops.patch_motion(x, [4, 7], tubelet, **kwargs))
    assert not vectors.any()


@pytest.mark.parametrize("dy, dx", [(0, 3), (2, 0), (-1, -2), (3, -3)])
def test_a_pan_is_found(dy, dx):
    """The picture moves: every patch whose block lies in the frame before is found there, exactly."""
    x = panned((1, 4, 3, 48, 64), torch.uint8, dy, dx)
    motion, vectors = search(x, [16, 16], 4)
    found = (vectors[0, 1:] == torch.tensor([dy, dx])).all(-1)
    i, j = torch.arange(3)[:, None] * 16 + dy, torch.arange(4) * 16 + dx
    inside = (i >= 0) & (i + 16 <= 48) & (j >= 0) & (j + 16 <= 64)
    assert torch.equal(found, inside.expand(3, 3, 4)) and inside.any()
    assert not motion[0, 1:][found].any()
    assert (motion[0, 1:] <= vtok.ops.patch_motion(x, [16, 16])[0, 1:]).all()


def test_the_bias_holds_patches_still():
    """Another vector is taken only for a gain of more than the bias."""
    x = torch.zeros(1, 2, 1, 2, 6)
    x[0, 0, 0, :, 2:4], x[0, 1, 0, :, 2:4] = 1.0, 3.0
    x[0, 0, 0, :, 3:5] = 3.0  # one to the right: 0, where the patch's own place scores 1
    for bias, want in ((0.0, [0, 1]), (0.5, [0, 1]), (0.99, [0, 1]), (1.0, [0, 0]), (5.0, [0, 0])):
        motion, vectors = search(x, [2, 2], 1, bias=bias)
        assert vectors[0, 1, 0, 1].tolist() == want and motion[0, 1, 0, 1] == (0 if want[1] else 1)


def test_ties_prefer_the_nearest_vector():
    """Stripes along x: the blocks one above and one below are alike, and so are all along the stripe."""
    x = torch.zeros(1, 2, 1, 12, 12, dtype=torch.uint8)
    x[0, 0, 0, ::2], x[0, 1, 0, 1::2] = 9, 9
    vectors = search(x, [4, 4], 3)[1][0, 1]
    assert vectors[:, 0].tolist() == [[1, 0], [-1, 0], [-1, 0]] and (vectors[..., 1] == 0).all()


def test_nan_loses_to_any_distance():
    x = torch.zeros(1, 2, 1, 2, 6)
    x[0, 0, 0, :, 2:4] = math.nan
    motion, vectors = search(x, [2, 2], 2)
    assert vectors[0, 1, 0].tolist() == [[0, 0], [0, -2], [0, 0]] and not motion[0, 1].any()
    x[0, 0] = math.nan
    motion, vectors = search(x, [2, 2], 2)
    assert motion[0, 1].isnan().all() and not vectors.any()
    x[0, 0, 0, 0, 0] = math.inf  # an infinite distance is less than NaN
    x[0, 0, 0, :, 2:4] = math.inf
    assert search(x, [2, 2], 2)[1][0, 1, 0, 0].tolist() == [0, 2]


def test_the_residual_is_what_the_distance_is_of():
    x = panned((2, 4, 3, 24, 32), torch.float32, 1, 2) / 255 + 0.05 * randn((2, 4, 3, 24, 32), torch.float32)
    motion, vectors = search(x, [8, 8], 3, metric="mse")
    site = torch.arange(motion.numel()).view(motion.shape)
    before = torch.where(torch.arange(4)[:, None, None] > 0, site - 12, -1)
    rows = vtok.ops.patchify(x, site.flatten(), [8, 8], 1, before.flatten(), vectors.flatten(0, 3))
    torch.testing.assert_close(rows.square().mean(1).view(motion.shape)[:, 1:], motion[:, 1:])
    assert vectors.any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_a_window_beyond_shared_memory(host_kernels, dtype, metric):
    x = video((1, 2, 1, 18, 2800), dtype, "window")
    everywhere(host_kernels, x, [17, 1399], 1, metric=metric, pad=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_a_search_anywhere(threads):
    x = video((1, 5, 3, 32, 320), torch.float32, "threads")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(same_bits, search(x, [16, 32], 2), room.reference(x, [16, 32], 2)))
    finally:
        torch.set_num_threads(before)


def test_more_than_2_31_elements():
    """Offsets are 64-bit: a strided view whose last frame lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 128, dtype=np.uint8))  # pages nobody touches take no memory
    frames = buffer.as_strided((1, 3, 1, 8, 12), (0, 2**30, 0, 12, 1))
    frames[:] = panned((1, 3, 1, 8, 12), torch.uint8, 1, 1)
    assert all(map(same_bits, search(frames, [4, 4], 2), search(frames.clone(), [4, 4], 2)))
