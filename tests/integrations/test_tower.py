"""A gated vision tower: the library's outputs with every patch kept, a masked tower's with some, and the FLOPs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import vision_utils
from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as qwen_config
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen_model

from vtok import Layout, Packed, gate_patches, ops
from vtok.integrations import _attention
from vtok.integrations.tower import Units, encode_patches, tower_flops, vision_tower

from rooms import ROOT

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NORMAL = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.25, 0.2]}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
QWEN = {"patch": 4, "tubelet": 2, "merge_size": 2}


def randomised(tower):
    """Nothing is zero or one, so that nothing can be forgotten."""
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return tower.eval()


def siglip(**changes):
    config = transformers.SiglipVisionConfig(**TINY, image_size=32, patch_size=8, **changes)
    return randomised(transformers.SiglipVisionModel(config))


def clip(**changes):
    config = transformers.CLIPVisionConfig(**TINY, image_size=32, patch_size=8, **changes)
    return randomised(transformers.CLIPVisionModel(config))


def qwen():
    """Layers 0 and 2 see windows of 2x2 units, layer 1 the frame."""
    config = qwen_config.Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=24, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    return randomised(qwen_model.Qwen2_5_VisionTransformerPretrainedModel(config))


SQUARE = [pytest.param(siglip, id="siglip"), pytest.param(clip, id="clip")]
ALL = [*SQUARE, pytest.param(qwen, id="qwen")]


def video(videos=2, frames=4, high=32, wide=32):
    return torch.randint(0, 256, (videos, frames, 3, high, wide), dtype=torch.uint8)


def gated(make, frames, budget="100%", **options):
    return gate_patches(frames, budget=budget, **(QWEN if make is qwen else {"patch": 8}), **NORMAL, **options)


def normalised(frames):
    mean, std = (torch.tensor(NORMAL[name])[:, None, None] for name in ("mean", "std"))
    return (frames.float() / 255 - mean) / std


def packed_of(make, frames, keep):
    """The units where ``keep`` [S]: any choice, which no gate would make."""
    whole = gated(make, frames)
    index = keep.nonzero()[:, 0]
    ends = F.pad(keep.cumsum(0), (1, 0))[whole.layout.cu_seqlens]
    return Packed(whole.values[index], index, ends, whole.layout)


def by_the_library(tower, frames, keep=None, **options):
    """[S, D]: SigLIP or CLIP on whole frames, attending to the patches in ``keep`` (and CLIP's class token) alone."""
    classes = int(hasattr(tower.embeddings, "class_embedding"))
    if keep is not None:
        keep = F.pad(keep.view(frames.shape[0] * frames.shape[1], 1, 1, -1), (classes, 0), value=True)
    out = tower(normalised(frames).flatten(0, 1), attention_mask=keep, **options)
    return out.last_hidden_state[:, classes:].flatten(0, 1)


def by_masks(tower, packed, keep):
    """[S, D] of a Qwen2.5-VL tower: its own layers on all units in the order of ``packed``, and masks of all pairs."""
    t, h, w = (packed.positions + torch.tensor([100, 0, 0]) * packed.layout.video_of(packed.index)[:, None]).unbind(-1)
    sides = torch.arange(2)
    rows, columns = (
        (h[:, None] * 2 + sides)[:, :, None].expand(-1, 2, 2),
        (w[:, None] * 2 + sides)[:, None].expand(-1, 2, 2),
    )
    cos, sin = tower.rotary_pos_emb(packed.values, torch.stack([rows, columns], -1).reshape(-1, 2))
    window = torch.stack([t, h // 2, w // 2], -1).repeat_interleave(4, 0)
    frame = window[:, 0]
    kept = keep.repeat_interleave(4)
    x = tower.patch_embed(packed.values.view(-1, 96))
    for depth, block in enumerate(tower.blocks):
        same = frame[:, None] == frame if depth == 1 else (window[:, None] == window).all(-1)
        q, k, v = block.attn.qkv(block.norm1(x)).view(-1, 3, 4, 8).unbind(1)
        q, k = qwen_model.apply_rotary_pos_emb_vision(q, k, cos, sin)
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=same & kept | torch.eye(len(x), dtype=torch.bool))
        x = x + block.attn.proj(mixed.transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x)


@pytest.mark.parametrize("make", SQUARE)
def test_every_patch_kept_is_the_plain_tower(make):
    tower, frames = make(), video()
    torch.testing.assert_close(encode_patches(tower, gated(make, frames)), by_the_library(tower, frames), **CLOSE)


@pytest.mark.parametrize("high, wide", [(16, 16), (24, 40), (32, 48), (8, 8)])
def test_every_unit_kept_is_the_plain_qwen_tower_bit_for_bit(high, wide):
    tower, packed = qwen(), gated(qwen, video(2, 6, high, wide))
    grid = torch.tensor([[3, high // 4, wide // 4]] * 2)
    want = tower(packed.values.view(-1, 96), grid_thw=grid).pooler_output
    assert torch.equal(encode_patches(tower, packed), want)
    units = Units.of(tower, packed)
    order, windows = vision_utils.get_vision_window_index(grid, spatial_merge_size=2, window_size=16, patch_size=4)
    assert torch.equal(units.order, order) and units.windows == windows.diff().tolist()


@pytest.mark.parametrize("make", SQUARE)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_some_patches_are_a_tower_that_attends_to_them_alone(make, share):
    tower, frames = make(), video()
    keep = torch.rand(2 * 4 * 16) < share
    keep[48:64], keep[64:80], keep[80] = False, True, True  # a frame with nothing, the whole of one
    packed = packed_of(make, frames, keep)
    want = by_the_library(tower, frames, keep)[keep]
    torch.testing.assert_close(encode_patches(tower, packed), want, **CLOSE)


@pytest.mark.parametrize("high, wide", [(16, 16), (24, 40), (32, 48)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_some_units_are_a_qwen_tower_that_attends_to_them_alone(high, wide, share):
    tower, frames = qwen(), video(2, 6, high, wide)
    whole = gated(qwen, frames)
    sites = whole.layout.total // 6
    keep = torch.rand(6 * sites) < share
    keep[sites : 2 * sites], keep[-1] = False, True
    packed = packed_of(qwen, frames, keep)
    torch.testing.assert_close(encode_patches(tower, packed), by_masks(tower, whole, keep)[keep], **CLOSE)


@pytest.mark.parametrize("make", ALL)
def test_a_dropped_frame_leaves_the_others_as_they_were(make):
    tower, frames = make(), video(1, 8)
    whole = gated(make, frames)
    frame = whole.positions[:, 0]
    keep = (frame != 1) & (frame != 2)
    torch.testing.assert_close(
        encode_patches(tower, packed_of(make, frames, keep)), encode_patches(tower, whole)[keep], **CLOSE
    )


@pytest.mark.parametrize("make", ALL)
def test_nothing_kept_and_nothing_there(make):
    tower, width = make(), 24 if make is qwen else 32
    for frames in (video(2, 4), video(0, 4), video(2, 0)):
        layout = gated(make, frames).layout
        packed = packed_of(make, frames, torch.zeros(layout.total, dtype=torch.bool))
        assert encode_patches(tower, packed).shape == (0, width)
        assert tower_flops(tower, packed) == 0
    assert tower_flops(tower, layout) == 0


@pytest.mark.parametrize("make", ALL)
def test_padding_is_zero_and_costs_nothing(make):
    tower, packed = make(), gated(make, video(), 9)
    index = F.pad(packed.index, (0, 5), value=-1)
    padded = Packed(F.pad(packed.values, (0, 0, 0, 5), value=7.0), index, packed.cu_seqlens, packed.layout)
    rows = encode_patches(tower, padded)
    assert torch.equal(rows[:-5], encode_patches(tower, packed)) and not rows[-5:].any()
    assert tower_flops(tower, padded) == tower_flops(tower, packed)


@pytest.mark.parametrize("make", ALL)
def test_a_threshold_trimmed_or_not(make):
    frames = video(2, 1).repeat(1, 6, 1, 1, 1)
    frames[:, 4:, :, :8, :8] ^= 85
    tower, packed = make(), gated(make, frames, None, threshold=0.1)
    trimmed = packed.trim()
    assert 0 < trimmed.index.shape[0] < packed.index.shape[0] and (trimmed.frame_counts == 0).any()
    rows = encode_patches(tower, packed)
    assert torch.equal(rows[: trimmed.index.shape[0]], encode_patches(tower, trimmed))
    assert not rows[trimmed.index.shape[0] :].any()


@pytest.mark.parametrize("make", ALL)
def test_flops_are_those_of_the_run_and_fall_in_proportion(make):
    tower, frames = make(), video(2, 6)
    shares, counted = [1.0, 0.5, 0.25], []
    for share in shares:
        packed = gated(make, frames, share)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, math_attention():
            encode_patches(tower, packed)
        assert tower_flops(tower, packed) == counter.get_total_flops()
        counted.append(counter.get_total_flops())
    assert tower_flops(tower, packed.layout) == counted[0]
    classes = 1 / 16 if make is clip else 0  # one row in each frame of 16 that no gate removes
    for share, flops in zip(shares, counted, strict=True):
        assert flops <= (share + classes) * counted[0]
        assert flops >= 0.7 * share * counted[0]


def math_attention():
    """The attention as plain products, which is how the counter can see it on a CPU."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


@pytest.mark.parametrize("make", SQUARE)
def test_the_whole_grid_costs_what_the_plain_tower_costs(make):
    changes = {"vision_use_head": False} if make is siglip else {}
    tower, frames = make(**changes), video()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, math_attention():
        by_the_library(tower, frames)
    assert tower_flops(tower, gated(make, frames).layout) == counter.get_total_flops()


@pytest.mark.parametrize("make", ALL)
def test_gradients_reach_the_weights_and_the_pixels(make):
    tower, frames = make(), (video().float() / 255).requires_grad_()
    packed = gated(make, frames, "50%")
    encode_patches(tower, packed).square().sum().backward()
    unused = ("head.", "post_layernorm") if make is clip else ("head.",)
    for name, parameter in tower.named_parameters():
        used = not name.startswith(unused)
        assert (parameter.grad is not None and parameter.grad.any() and parameter.grad.isfinite().all()) == used, name
    patches = ops.patchify(frames.grad, torch.arange(2 * 4 * 16), [8, 8]) if make is not qwen else None
    if patches is not None:
        assert patches[packed.index].any(1).all() and not patches[~packed.mask].any()
    assert frames.grad.any()


@pytest.mark.parametrize("make", SQUARE)
def test_gradients_are_the_librarys(make):
    tower, frames = make(), video()
    tower_grads = []
    for run in (lambda: encode_patches(tower, gated(make, frames)), lambda: by_the_library(tower, frames)):
        tower.zero_grad()
        run().square().mean().backward()
        tower_grads.append({name: p.grad for name, p in tower.named_parameters() if p.grad is not None})
    assert tower_grads[0].keys() == tower_grads[1].keys()
    for name, grad in tower_grads[0].items():
        torch.testing.assert_close(grad, tower_grads[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", SQUARE)
@pytest.mark.parametrize("high, wide", [(16, 24), (16, 64), (48, 48)])
def test_frames_of_another_size(make, high, wide):
    tower, frames = make(), video(high=high, wide=wide)
    packed = gated(make, frames)
    with pytest.raises(ValueError, match=f"expected frames of 4x4 patches, .* got {high // 8}x{wide // 8}"):
        encode_patches(tower, packed)
    rows = encode_patches(tower, packed, interpolate_pos_encoding=True)
    torch.testing.assert_close(rows, by_the_library(tower, frames, interpolate_pos_encoding=True), **CLOSE)


@pytest.mark.parametrize("make", ALL)
def test_bfloat16_towers(make):
    tower, packed = make(), gated(make, video(), "50%")
    want = encode_patches(tower, packed)
    rows = encode_patches(tower.to(torch.bfloat16), packed)
    assert rows.dtype == torch.bfloat16
    assert (rows.float() - want).norm() < 0.05 * want.norm()


def test_varlen_attention_is_told_the_segments(monkeypatch):
    """The call that CUDA devices get, with a stand-in for flash attention."""
    seen = []

    def varlen_attn(q, k, v, bounds_q, bounds_k, longest_q, longest_k):
        assert bounds_q.dtype == torch.int32 and torch.equal(bounds_q, bounds_k)
        lengths = bounds_q.diff()
        assert longest_q == longest_k == lengths.max() and bounds_q[-1] == q.shape[0]
        seen.append(lengths.tolist())
        return _attention.batched(q, k, v, lengths.tolist(), 0.0)

    from torch.nn.attention import varlen

    tower, packed = siglip(), gated(siglip, video(), [[3, 1, 0, 3], [16, 2, 0, 0]])
    want = encode_patches(tower, packed)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(_attention, "has_varlen", lambda q: True)
    assert torch.equal(encode_patches(tower, packed), want)
    assert seen == [[1, 2, 3, 3, 16]] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(make, dtype):
    tower, frames = make(), video()
    want = encode_patches(tower, gated(make, frames, "50%"))
    rows = encode_patches(tower.to("cuda", dtype), gated(make, frames.cuda(), "50%"))
    assert (rows.cpu().float() - want).norm() < (0.05 if dtype == torch.bfloat16 else 1e-3) * want.norm()


def test_dropout_while_training():
    tower, packed = siglip(attention_dropout=0.9), gated(siglip, video(), "50%")
    still = encode_patches(tower, packed)
    assert torch.equal(encode_patches(tower, packed), still)
    tower.train()
    assert not torch.allclose(encode_patches(tower, packed), still)


def test_towers_are_found_in_their_models():
    text = TINY | {"vocab_size": 50, "max_position_embeddings": 16}
    vision = TINY | {"image_size": 32, "patch_size": 8}
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    assert vision_tower(model) is model.vision_model
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    assert vision_tower(model) is model.vision_model
    frames = video()
    assert encode_patches(model, gated(clip, frames, "50%")).shape == (64, 32)
    config = qwen_config.Qwen2_5_VLConfig(
        text_config={
            **TINY, "vocab_size": 50, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config=qwen().config.to_dict(),
    )  # fmt: skip
    model = qwen_model.Qwen2_5_VLForConditionalGeneration(config)
    assert vision_tower(model) is model.model.visual
    assert encode_patches(model, gated(qwen, frames, "50%")).shape == (32, 24)


def test_errors_are_one_sentence():
    packed = gated(siglip, video(), 5)
    towers = "expected a SiglipVisionModel, a CLIPVisionModel or the visual of Qwen2.5-VL, or a model with one of them"
    for other, got in [
        (torch.nn.Linear(2, 2), "Linear with 0"),
        (torch.nn.ModuleList([siglip(), clip()]), "ModuleList with 2"),
        ("siglip", "str with 0"),
    ]:
        with pytest.raises(TypeError, match=f"{towers}, got {got}"):
            encode_patches(other, packed)
        with pytest.raises(TypeError, match=towers):
            tower_flops(other, packed)
    with pytest.raises(ValueError, match=r"expected packed values \[K, 384\], 4 patch.* got \(10, 192\)"):
        encode_patches(qwen(), packed)
    with pytest.raises(ValueError, match=r"expected packed values \[K, 192\], 1 patch.* got \(10, 384\)"):
        encode_patches(clip(), gated(qwen, video(), 5))
    ragged = Layout.from_grid([(1, 4, 4), (1, 2, 2)])
    with pytest.raises(ValueError, match="of one size and interpolated, got 2x2 and 4x4"):
        mixed = Packed(torch.zeros(1, 192), torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1, 1]), ragged)
        encode_patches(clip(), mixed, interpolate_pos_encoding=True)


def test_the_library_stays_out_of_vtok():
    code = "import sys, vtok.integrations.tower; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
