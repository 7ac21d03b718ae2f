"""patchify: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok
from vtok.ops import _check
from vtok.ops._rooms import ROOMS

from rooms import FLOATS, Case, Error, from_numpy, generator, poisoned, randn, same_bits, to_numpy

patchify = vtok.ops.patchify
room = ROOMS["patchify"]
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
F64 = torch.float64


def clip(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator(shape), dtype=torch.uint8)
    return randn(shape, dtype, "clip")


def sites(frames: torch.Tensor, patch: list[int], tubelet: int = 1) -> int:
    return math.prod(room.grid_of(frames, patch, tubelet))


def some(frames: torch.Tensor, patch: list[int], tubelet: int = 1, seed: int = 0, count: int = 0) -> torch.Tensor:
    """Sites with repeats and -1, more than a block of warps takes."""
    S = sites(frames, patch, tubelet)
    return torch.randint(-1, S, (count or S + 9,), generator=generator(S, seed))


def case(name: str, shape: tuple[int, ...], patch: list[int], tubelet: int = 1, source=torch.uint8, **kwargs) -> Case:
    frames = clip(shape, source)
    return Case(name, (frames, some(frames, patch, tubelet), patch, tubelet), kwargs)


def residual(name: str, shape: tuple[int, ...], patch: list[int], tubelet: int = 1, source=torch.uint8, **kwargs):
    made = case(name, shape, patch, tubelet, source, **kwargs)
    return Case(name, (*made.args, some(made.args[0], patch, tubelet, seed=1)), kwargs)


def moved(name: str, shape: tuple[int, ...], patch: list[int], tubelet: int = 1, source=torch.uint8, **kwargs) -> Case:
    """References anywhere, some of them beyond the frame, the farthest as far as integers go."""
    made = residual(name, shape, patch, tubelet, source, **kwargs)
    vectors = torch.randint(-max(patch), max(patch) + 1, (made.args[1].shape[0], 2), generator=generator(shape, "far"))
    vectors[:3] = torch.tensor([[2**63 - 1, 0], [0, -(2**63)], [0, 0]])
    return Case(name, (*made.args, vectors), kwargs)


def special() -> torch.Tensor:
    x = clip((1, 2, 3, 4, 4), torch.float32)
    x[0, 0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    x[0, 0, 1, 1] = 0.0
    x[0, 1, 2, 3] = 3e38
    x[0, 1, 2, 2] = 1e-40
    return x


def cases() -> list[Case]:
    pairs = [(a, b) for a in (torch.uint8, *FLOATS) for b in FLOATS]
    index = torch.tensor([3, -1, 0, 0])
    return [
        *(case(f"{str(a)[6:]}-{str(b)[6:]}", (1, 2, 3, 8, 8), [4, 4], 1, a, dtype=b, **CLIP) for a, b in pairs),
        case("float64", (1, 2, 3, 4, 4), [2, 2], 1, F64, **CLIP),
        case("uint8-plain", (2, 2, 2, 8, 8), [4, 4], 2),
        case("bfloat16-plain", (2, 2, 2, 6, 6), [2, 3], 2, torch.bfloat16),
        case("mean-alone", (1, 1, 3, 4, 4), [2, 2], mean=[0.1, -0.2, 0.3]),
        case("std-alone", (1, 1, 3, 4, 4), [2, 2], std=[0.1, 0.2, 0.3]),
        case("16", (1, 2, 3, 32, 48), [16, 16], dtype=torch.bfloat16, **CLIP),
        case("16-wide-floats", (1, 2, 3, 16, 32), [16, 16], 1, torch.float32, **CLIP),
        case("14", (1, 1, 3, 28, 42), [14, 14], 1, torch.bfloat16, **CLIP),
        case("14-tubelet", (1, 4, 3, 28, 14), [14, 14], 2, **CLIP),
        case("odd-width", (2, 3, 1, 6, 10), [3, 5], 3, torch.float16),
        case("thwc", (2, 2, 3, 8, 8), [4, 4], 2, order="thwc", **CLIP),
        case("thwc-floats", (1, 2, 5, 4, 6), [2, 3], 1, torch.float16, order="thwc"),
        case("pad", (1, 2, 3, 9, 7), [4, 4], 2, pad=True, **CLIP),
        case("pad-wide", (1, 2, 1, 12, 20), [8, 8], pad=True, std=[0.5]),
        case("pad-thwc", (1, 1, 2, 3, 3), [2, 5], 1, torch.float32, pad=True, order="thwc", mean=[0.5, 0.25]),
        case("beyond-a-block", (1, 2, 2, 40, 40), [40, 40], std=[0.5, 0.25]),
        case("long-strips", (1, 1, 2, 2, 1100), [1, 1100], 1, torch.bfloat16, order="thwc"),
        residual("residual", (2, 4, 3, 8, 8), [4, 4], 2, **CLIP),
        residual("residual-wide", (1, 3, 3, 16, 32), [16, 16], dtype=torch.bfloat16, **CLIP),
        residual("residual-floats", (1, 3, 3, 4, 6), [2, 3], 1, torch.float16, **CLIP),
        residual("residual-thwc", (1, 4, 3, 4, 4), [2, 2], 2, torch.float32, order="thwc", **CLIP),
        residual("residual-pad", (1, 2, 3, 7, 9), [4, 4], 2, pad=True, **CLIP),
        residual("residual-64", (1, 2, 3, 4, 4), [2, 2], 2, F64, **CLIP),
        moved("moved", (2, 4, 3, 8, 8), [4, 4], 2, **CLIP),
        moved("moved-wide", (1, 3, 3, 32, 48), [16, 16], dtype=torch.bfloat16, **CLIP),
        moved("moved-floats", (1, 3, 3, 16, 32), [8, 8], 1, torch.bfloat16, **CLIP),
        moved("moved-thwc-pad", (1, 4, 3, 7, 9), [4, 4], 2, torch.float32, order="thwc", pad=True, **CLIP),
        moved("moved-64", (1, 2, 3, 4, 4), [2, 2], 1, F64, **CLIP),
        Case("special", (special(), index, [2, 4], 1), CLIP),
        Case("special-residual", (special(), index, [2, 4], 1, torch.tensor([0, 1, 3, 0])), {"dtype": torch.float16}),
        Case("no-index", (clip((1, 2, 3, 4, 4)), torch.empty(0, dtype=torch.int64), [2, 2])),
        Case("no-frames", (clip((1, 0, 3, 4, 4)), torch.tensor([-1, -1]), [2, 2])),
        Case("no-pixels", (clip((1, 1, 3, 0, 4)), torch.tensor([-1]), [2, 2])),
        Case("no-channels", (clip((1, 1, 0, 4, 4)), torch.tensor([0, 1]), [2, 2])),
    ]


def grad_cases() -> list[Case]:
    x = clip((2, 2, 2, 4, 6), F64).requires_grad_()
    both = {"mean": [0.5, 0.25], "std": [0.5, 2.0]}
    edge = clip((1, 2, 2, 3, 5), F64).requires_grad_()
    twice = torch.tensor([3, 3, -1, 0, 7, 3])
    vectors = torch.tensor([[1, -1], [0, 0], [0, 1], [2, 2], [-1, 0], [9, -9]])
    return [
        Case("repeats", (x, twice, [2, 3], 1), both),
        Case("tubelet-thwc", (x, twice, [2, 2], 2), {"order": "thwc"}),
        Case("residual", (x, twice, [2, 3], 1, torch.tensor([3, 0, 2, -1, 3, 0])), both),
        Case("pad", (edge, twice, [2, 2], 1, torch.tensor([0, 5, 1, 2, 2, -1])), {"pad": True, **both}),
        Case("none", (x, twice[:0], [2, 2])),
        Case("moved", (x, twice, [2, 3], 1, torch.tensor([3, 0, 2, -1, 3, 0]), vectors), both),
        Case("moved-thwc", (x, twice[:4], [2, 2], 2, torch.tensor([3, 0, 2, 1]), vectors[:4]), {"order": "thwc"}),
        Case("moved-pad", (edge, twice, [2, 2], 1, torch.tensor([0, 5, 1, 2, 2, -1]), vectors), {"pad": True}),
    ]


def errors() -> list[Error]:
    x, i, p = clip((1, 3, 3, 4, 6)), torch.tensor([0, 1]), [2, 2]
    pair = torch.zeros(2, 2, dtype=torch.int64)
    e = "vtok::patchify: expected "
    return [
        Error(f"{e}frames of shape (B, T, C, H, W), got (3, 3, 4, 6)", (x[0], i, p)),
        Error(f"{e}frames of dtype uint8, float32, float16, bfloat16 or float64, got int32", (x.int(), i, p)),
        Error(f"{e}index of shape (K,), got (1, 2)", (x, i[None], p)),
        Error(f"{e}index of dtype int64, got int32", (x, i.int(), p)),
        Error(f"{e}reference_index of dtype int64, got int32", (x, i, p, 1, i.int())),
        Error(f"{e}reference_index of shape (K,)=(2,), got (1,)", (x, i, p, 1, i[:1])),
        Error(f"{e}vectors with a reference_index, got none", (x, i, p, 1, None, pair)),
        Error(f"{e}vectors of dtype int64, got int32", (x, i, p, 1, i, pair.int())),
        Error(f"{e}vectors of shape (K, 2)=(2, 2), got (4,)", (x, i, p, 1, i, pair.flatten())),
        Error(f"{e}vectors of shape (K, 2)=(2, 2), got (1, 2)", (x, i, p, 1, i, pair[:1])),
        Error(f"{e}patch as two sizes >= 1, got [2]", (x, i, [2])),
        Error(f"{e}patch as two sizes >= 1, got [0, 2]", (x, i, [0, 2])),
        Error(f"{e}tubelet >= 1, got 0", (x, i, p, 0)),
        Error(f"{e}T divisible by tubelet=2, got T=3", (x, i, p, 2)),
        Error(f"{e}H and W divisible by patch=[2, 4] without pad, got H=4 and W=6", (x, i, [2, 4])),
        Error(f'{e}order of "cthw" or "thwc", got "hwc"', (x, i, p), {"order": "hwc"}),
        Error(f"{e}mean of C=3 values, got 2", (x, i, p), {"mean": [0.5, 0.5]}),
        Error(f"{e}std of C=3 values, got 4", (x, i, p), {"std": [0.5] * 4}),
        Error(f"{e}mean finite, got mean[1]=nan", (x, i, p), {"mean": [0.5, math.nan, 0.5]}),
        Error(f"{e}std finite and > 0, got std[2]=0", (x, i, p), {"std": [0.5, 0.5, 0.0]}),
        Error(f"{e}std finite and > 0, got std[0]=inf", (x, i, p), {"std": [math.inf, 0.5, 0.5]}),
        Error(f"{e}std finite and > 0, got std[0]=-0.5", (x, i, p), {"std": [-0.5, 0.5, 0.5]}),
        Error(f"{e}C of at most 128 with mean, got C=129", (clip((1, 1, 129, 2, 2)), i, p), {"mean": [0.0] * 129}),
        Error(f"{e}dtype of float32, float16 or bfloat16, got int8", (x, i, p), {"dtype": torch.int8}),
        Error(f"{e}dtype of float32, float16 or bfloat16, got float64", (x, i, p), {"dtype": F64}),
        Error(f"{e}dtype of float64 for float64 frames, got float32", (x.double(), i, p), {"dtype": torch.float32}),
        Error(f"{e}index in [-1, 18), got 2 values outside", (x, torch.tensor([18, -2, 17]), p), only_cpu=True),
        Error(f"{e}reference_index in [-1, 18), got 1 values outside", (x, i, p, 1, i + 17), only_cpu=True),
    ]


def host(
    kernels, frames, index, patch, tubelet=1, reference_index=None, vectors=None, *,
    mean=None, std=None, dtype=None, order="cthw", pad=False,
):  # fmt: skip
    _, _, C, H, W = frames.shape
    dtype = room.output_dtype(frames, dtype)
    out = poisoned((index.shape[0], C * tubelet * patch[0] * patch[1]), dtype)
    if out.size:
        fields = [C, H, W, *room.grid_of(frames, patch, tubelet), tubelet, *patch, *frames.stride()]
        extent = 1 + sum((n - 1) * s for n, s in zip(frames.shape, frames.stride(), strict=True))
        memory = frames.detach().as_strided((extent if frames.numel() else 0,), (1,))
        scale, shift = (np.array(v) for v in room.affine(frames.dtype == torch.uint8, mean, std))
        getattr(kernels, f"patchify_{_check.dtype_text(frames.dtype)}_{_check.dtype_text(dtype)}")(
            to_numpy(memory), np.array(fields, np.int64).view(f"V{8 * len(fields)}"), to_numpy(index),
            None if reference_index is None else to_numpy(reference_index),
            None if vectors is None else to_numpy(vectors), index.shape[0], scale, shift, len(scale) > 1,
            order == "thwc", out,
        )  # fmt: skip
    return from_numpy(out, dtype)


def everywhere(kernels, *args, **kwargs) -> torch.Tensor:
    """The result, after all backends were seen to return it."""
    want = room.reference(*args, **kwargs)
    assert same_bits(patchify(*args, **kwargs), want)
    assert same_bits(host(kernels, *args, **kwargs), want)
    return want


def every_site(frames: torch.Tensor, patch: list[int], tubelet: int = 1) -> torch.Tensor:
    return torch.arange(sites(frames, patch, tubelet))


def test_a_row_times_the_weight_is_the_convolution():
    """Conv2d over frames and Conv3d over tubelets, whose weights are flattened as they are."""
    x = clip((2, 4, 3, 28, 42), torch.float32)
    flat = torch.nn.Conv2d(3, 8, (14, 14), (14, 14), bias=False)
    rows = patchify(x, every_site(x, [14, 14]), [14, 14])
    want = flat(x.flatten(0, 1)).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(rows @ flat.weight.flatten(1).T, want, rtol=1e-4, atol=1e-4)
    tube = torch.nn.Conv3d(3, 8, (2, 14, 14), (2, 14, 14), bias=False)
    rows = patchify(x, every_site(x, [14, 14], 2), [14, 14], 2)
    want = tube(x.transpose(1, 2)).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(rows @ tube.weight.flatten(1).T, want, rtol=1e-4, atol=1e-4)


def test_equals_unfold():
    x = clip((2, 3, 3, 8, 12), torch.float32)
    mean, std = (torch.tensor(CLIP[name])[:, None, None] for name in ("mean", "std"))
    want = torch.nn.functional.unfold(((x - mean) / std).flatten(0, 1), (4, 6), stride=(4, 6)).mT.flatten(0, 1)
    torch.testing.assert_close(patchify(x, every_site(x, [4, 6]), [4, 6], **CLIP), want, rtol=1e-5, atol=1e-6)


def test_thwc_is_the_same_row_in_another_order():
    x = clip((1, 4, 3, 8, 12))
    index = some(x, [4, 6], 2)
    a = patchify(x, index, [4, 6], 2, **CLIP).view(-1, 3, 2, 4, 6)
    b = patchify(x, index, [4, 6], 2, order="thwc", **CLIP).view(-1, 2, 4, 6, 3)
    assert torch.equal(a.permute(0, 2, 3, 4, 1), b)


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_within_the_bound(dtype):
    """The bound that the docstring states, before the rounding to the output's dtype."""
    x = clip((1, 4, 3, 16, 16), dtype)
    rows = patchify(x, every_site(x, [8, 8]), [8, 8], dtype=torch.float32, **CLIP).view(-1, 3, 64).double()
    exact = patchify(x.double() / (255 if dtype == torch.uint8 else 1), every_site(x, [8, 8]), [8, 8]).view(-1, 3, 64)
    mean, std = (torch.tensor(CLIP[name], dtype=F64)[:, None] for name in ("mean", "std"))
    value = (exact - mean) / std
    bound = 2**-24 * (2 * (exact / std).abs() + (mean / std).abs() + value.abs()) * (1 + 2**-20)
    assert ((rows - value).abs() <= bound).all()


def test_all_256_pixel_values_are_the_stated_arithmetic():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 1, 256)
    rows = patchify(x, torch.tensor([0]), [1, 256], mean=[0.48], std=[0.27])[0]
    scale, shift = np.float32(1 / (255 * 0.27)), np.float32(0.48 / 0.27)
    assert rows.tolist() == [float(np.float32(np.float32(v) * scale) - shift) for v in range(256)]


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS, F64])
def test_memory_of_any_order(host_kernels, dtype):
    """Channels last, a crop of a larger clip, the same with y and x swapped, one frame repeated."""
    whole = clip((2, 4, 12, 16, 3), dtype)
    crop = clip((2, 6, 3, 20, 30), dtype)[:, 1:5, :, 3:15, 7:23]
    for frames in (whole.permute(0, 1, 4, 2, 3), crop, crop.transpose(3, 4), crop[:, :1].expand(-1, 4, -1, -1, -1)):
        got = everywhere(host_kernels, frames, some(frames, [4, 4], 2), [4, 4], 2, **CLIP)
        assert same_bits(got, patchify(frames.contiguous(), some(frames, [4, 4], 2), [4, 4], 2, **CLIP))


@pytest.mark.parametrize("start", range(1, 9))
def test_unaligned_pixels(host_kernels, start):
    """Strips that start off a word's boundary are read value by value, not with a fault."""
    for dtype in (torch.uint8, torch.bfloat16):
        frames = clip((1, 2, 3, 8, 40), dtype)[..., start : start + 32]
        everywhere(host_kernels, frames, some(frames, [8, 8]), [8, 8], dtype=torch.bfloat16)


def test_residual_rows():
    """A static patch is exactly 0, -1 leaves the patch itself, and the mean cancels."""
    x = clip((1, 1, 3, 8, 8)).expand(-1, 3, -1, -1, -1)
    index = torch.arange(4, 12)
    assert not patchify(x, index, [4, 4], 1, index - 4, **CLIP).any()
    none = torch.full_like(index, -1)
    assert torch.equal(patchify(x, index, [4, 4], 1, none, **CLIP), patchify(x, index, [4, 4], **CLIP))
    x = clip((1, 3, 3, 8, 8))
    rows = patchify(x, index, [4, 4], 1, index - 4, **CLIP)
    assert torch.equal(rows, patchify(x, index, [4, 4], 1, index - 4, std=CLIP["std"]))
    integers = patchify(x, index, [4, 4], 1, index - 4, std=[1 / 255] * 3)
    assert torch.equal(integers, integers.round())
    torch.testing.assert_close(
        rows, patchify(x, index, [4, 4], **CLIP) - patchify(x, index - 4, [4, 4], **CLIP), rtol=0, atol=1e-6
    )


def test_a_moved_reference_is_the_block_there():
    """At every vector: the block where it lies in the frame, nothing where it does not."""
    x = clip((1, 2, 3, 8, 12), torch.float32)
    room_around = torch.nn.functional.pad(x, (12, 12, 12, 12))
    own = x[0, 1, :, 4:8, 4:8]
    for dy, dx in [(0, 0), (-4, -4), (0, 4), (-3, 2), (1, 0), (0, -5), (12, 0), (-12, 12)]:
        row = patchify(x, torch.tensor([10]), [4, 4], 1, torch.tensor([4]), torch.tensor([[dy, dx]]))
        block = room_around[0, 0, :, 16 + dy : 20 + dy, 16 + dx : 20 + dx]
        assert torch.equal(row, (own - block).reshape(1, -1))


def test_a_row_of_padding_has_no_reference():
    x = clip((1, 1, 3, 8, 8))
    assert not patchify(x, torch.tensor([-1]), [4, 4], 1, torch.tensor([2])).any()


def test_pixels_outside_are_the_mean_colour():
    x = torch.full((1, 1, 3, 5, 7), 255, dtype=torch.uint8)
    rows = patchify(x, every_site(x, [4, 4]), [4, 4], pad=True, **CLIP).view(2, 2, 3, 4, 4)
    assert rows[0, 0].all()
    assert rows[0, 1, :, :, :3].all() and not rows[0, 1, :, :, 3].any()
    assert rows[1, 0, :, 0].all() and not rows[1, 0, :, 1:].any()
    outside = patchify(x, torch.tensor([3]), [4, 4], 1, torch.tensor([0]), pad=True, **CLIP).view(3, 4, 4)
    assert torch.equal(outside[:, 1:], -rows[0, 0, :, 1:])  # nothing less the pixel of the reference


def test_not_a_number_passes_through():
    rows = patchify(special(), torch.tensor([0]), [2, 4], dtype=torch.bfloat16, **CLIP)
    assert rows.isnan().nonzero().tolist() == [[0, 0]]
    assert rows[0, 1:3].tolist() == [math.inf, -math.inf]


def test_pixels_have_no_gradient():
    x = clip((1, 1, 3, 4, 4))
    assert not patchify(x, torch.tensor([0]), [2, 2]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_in_the_dtype_of_the_frames(dtype):
    x = clip((1, 2, 3, 8, 8), dtype).requires_grad_()
    index = some(x, [4, 4])
    patchify(x, index, [4, 4], dtype=torch.bfloat16, std=CLIP["std"]).float().square().sum().backward()
    exact = x.detach().double().requires_grad_()
    patchify(exact, index, [4, 4], std=CLIP["std"]).square().sum().backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=3e-2, atol=1e-1)


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(*[st.integers(1, 3)] * 4), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 3),
    st.sampled_from(FLOATS), st.sampled_from(["cthw", "thwc"]), st.booleans(), st.data(),
)  # fmt: skip
def test_rows_of_every_site_restore_the_frames(host_kernels, grid, patch, tubelet, dtype, order, pad, data):
    """Without normalisation the rows are the pixels, bit for bit, whatever the order they are asked for in."""
    B, steps, high, wide = grid
    (ph, pw), C = patch, data.draw(st.integers(1, 4))
    H = high * ph - (data.draw(st.integers(0, ph - 1)) if pad else 0)
    W = wide * pw - (data.draw(st.integers(0, pw - 1)) if pad else 0)
    frames = clip((B, steps * tubelet, C, H, W), dtype)
    shuffled = torch.randperm(math.prod(grid), generator=generator(grid))
    rows = everywhere(host_kernels, frames, shuffled, list(patch), tubelet, order=order, pad=pad)
    rows = rows[shuffled.argsort()]
    if order == "thwc":
        rows = rows.view(*grid, tubelet, ph, pw, C).permute(0, 1, 2, 3, 7, 4, 5, 6)
    restored = rows.reshape(*grid, C, tubelet, ph, pw).permute(0, 1, 5, 4, 2, 6, 3, 7)
    restored = restored.reshape(B, steps * tubelet, C, high * ph, wide * pw)
    assert same_bits(restored[..., :H, :W], frames)
    assert not restored[..., H:, :].any() and not restored[..., W:].any()


BAD = st.sampled_from([-(2**63), -2, -1, 0, 5, 17, 18, 19, 2**31, 2**63 - 1])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(BAD, BAD), min_size=1, max_size=12))
def test_no_index_leads_outside_a_tensor(host_kernels, pairs):
    """CUDA cannot look at the values without a sync: a site that is none makes a row of zeros, or is no reference."""
    frames = clip((1, 3, 3, 4, 6))
    index, reference = (torch.tensor(column) for column in zip(*pairs, strict=True))
    got = host(host_kernels, frames, index, [2, 2], 1, reference, **CLIP)
    sound = [torch.where((x >= 0) & (x < 18), x, -1) for x in (index, reference)]
    assert same_bits(got, room.reference(frames, sound[0], [2, 2], 1, sound[1], **CLIP))


def test_more_than_2_31_elements():
    """Offsets are 64-bit, and so are the numbers of sites: views whose last frame lies beyond 2^31 elements."""
    buffer = torch.from_numpy(np.zeros(2**31 + 2**20, dtype=np.uint8))  # pages nobody touches take no memory
    frames = buffer.as_strided((1, 3, 3, 8, 8), (0, 2**30, 64, 8, 1))
    frames[:] = clip((1, 3, 3, 8, 8))
    index = some(frames, [4, 4])
    assert same_bits(patchify(frames, index, [4, 4]), patchify(frames.clone(), index, [4, 4]))
    last = 2**31 + 2**19  # the frames overlap: each begins one value after the one before
    frames = buffer.as_strided((1, last + 1, 1, 2, 2), (0, 1, 0, 2, 1))
    frames[0, last] = 7
    assert patchify(frames, torch.tensor([last, 2**20]), [2, 2], std=[1 / 255]).tolist() == [[7.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_rows(threads):
    x = clip((1, 2, 3, 64, 64))
    index = some(x, [4, 4], count=3000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_bits(patchify(x, index, [4, 4]), room.reference(x, index, [4, 4]))
    finally:
        torch.set_num_threads(before)


def test_compiled_once_for_any_patch():
    torch._dynamo.reset()
    compiled = torch.compile(patchify, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for patch in ([4, 4], [2, 8], [8, 2]):
            x = clip((2, 4, 3, 8, 8))
            assert same_bits(compiled(x, some(x, patch, 2), patch, 2), patchify(x, some(x, patch, 2), patch, 2))
