"""A gated vision tower: SigLIP, CLIP and Qwen2.5-VL of ``transformers`` see the kept patches and nothing else.

``transformers`` itself is not imported: the tower is the caller's, and brings its own layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok.integrations._attention import segment_attention
from vtok.layout import Layout, cumulative, upload
from vtok.packed import Packed

QWEN = {"Qwen2_5_VisionTransformerPretrainedModel"}
SQUARE = {"SiglipVisionModel", "SiglipVisionTransformer", "CLIPVisionModel", "CLIPVisionTransformer"}


def encode_patches(model: nn.Module, packed: Packed, *, interpolate_pos_encoding: bool = False) -> Tensor:
    """What a vision tower makes of the kept patches alone; with every patch kept, what it makes of the frames.

    Args:
        model: a SiglipVisionModel, a CLIPVisionModel or the ``visual`` of Qwen2.5-VL from ``transformers``, or a model
            that contains one of them.
        packed: of ``gate_patches``, with the processor's mean and std and the tower's own patch: ``patch=patch_size``
            and, for Qwen2.5-VL, ``tubelet=temporal_patch_size, merge_size=spatial_merge_size``.
        interpolate_pos_encoding: for SigLIP and CLIP on frames of another size than they were trained on, as in the
            library; a ValueError otherwise.

    Returns:
        [K, D], the dtype of the tower, a row for each of ``packed.index``, zero where that is padding. SigLIP and CLIP:
        the rows of ``last_hidden_state`` (SigLIP's is behind its last norm, CLIP's before it); CLIP's class token
        runs along in each frame that kept a patch and is left out of the rows. Qwen2.5-VL: ``pooler_output``, a row
        for each merge unit, in the order of ``packed``.

    A patch attends to the kept patches of its own frame, in Qwen2.5-VL's window layers to those of its own window;
    frames and windows that kept nothing cost nothing. Differentiable in the tower's weights and ``packed.values``.
    Waits for the device to learn how many rows each frame kept, so no part of a captured graph.
    """
    tower = vision_tower(model)
    expect_rows(tower, packed)
    if is_qwen(tower):
        return encode_units(tower, packed)
    return encode_frames(tower, packed, position_table(tower, packed.layout, interpolate_pos_encoding))


def tower_flops(model: nn.Module, packed: Packed | Layout) -> int:
    """Floating-point operations of ``encode_patches``, of the whole grid if given its Layout.

    Two for each multiply-add of the patch embedding, the linear layers, the attention and Qwen2.5-VL's merger. Waits
    for the device, as the run itself.
    """
    if isinstance(packed, Layout):
        index = torch.arange(packed.total, device=packed.device)
        packed = Packed(torch.empty(packed.total, 0, device=packed.device), index, packed.cu_seqlens, packed)
    tower = vision_tower(model)
    conv, width = patch_embedding(tower).weight, tower.config.hidden_size
    if is_qwen(tower):
        units, unit = Units.of(tower, packed), tower.spatial_merge_size**2
        whole = set(tower.fullatt_block_indexes)
        blocks = [units.frames if depth in whole else units.windows for depth in range(len(tower.blocks))]
        patches = sum(units.frames)
        linear = patches * weights(tower.blocks) + patches // unit * weights(tower.merger)
    else:
        frames = Frames.of(tower, packed)
        blocks = [frames.lengths] * len(tower.encoder.layers)
        patches = frames.kept
        linear = sum(frames.lengths) * weights(tower.encoder)
    pairs = sum(length * length for lengths in blocks for length in lengths)
    return 2 * (patches * conv.numel() + linear + 2 * pairs * width)


def weights(module: nn.Module) -> int:
    """Multiply-adds of a row in a module's linear layers."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def vision_tower(model: nn.Module) -> Any:
    """The one tower of a model, by the name of its class: importing the classes would import the library."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if is_qwen(module) or is_square(module)]
    if len(found) != 1:
        raise TypeError(
            "expected a SiglipVisionModel, a CLIPVisionModel or the visual of Qwen2.5-VL, or a model with one of them, "
            f"got {type(model).__name__} with {len(found)}"
        )
    return found[0]


def is_qwen(module: nn.Module) -> bool:
    return any(cls.__name__ in QWEN for cls in type(module).__mro__)


def is_square(module: nn.Module) -> bool:
    """A SigLIP or CLIP tower, not the shell that some versions of the library put around it."""
    return any(cls.__name__ in SQUARE for cls in type(module).__mro__) and hasattr(module, "embeddings")


def patch_embedding(tower: Any) -> Any:
    return tower.patch_embed.proj if is_qwen(tower) else tower.embeddings.patch_embedding


def expect_rows(tower: Any, packed: Packed) -> None:
    shape = list(patch_embedding(tower).weight.shape[1:])
    patches = tower.spatial_merge_size**2 if is_qwen(tower) else 1
    numbers = patches * patch_embedding(tower).weight[0].numel()
    if packed.values.dim() != 2 or packed.values.shape[1] != numbers:
        raise ValueError(
            f"expected packed values [K, {numbers}], {patches} patch(es) of {shape} each, "
            f"got {tuple(packed.values.shape)}"
        )


# SigLIP and CLIP: full attention within a frame, learned positions


@dataclass(frozen=True)
class Frames:
    """The hidden rows of the frames that kept any: frame after frame, those with fewest rows first.

    Sorted, so that frames with equally many rows are one batch of attention: no padding, and few calls.

    leading: 1 with a class token before each frame's rows, else 0. lengths: rows of each frame, ascending.
    source: int64 [sum of lengths], the packed row of each hidden row; -1 for a class token.
    """

    leading: int
    lengths: list[int]
    source: Tensor

    @property
    def kept(self) -> int:
        return sum(self.lengths) - self.leading * len(self.lengths)

    @classmethod
    def of(cls, tower: Any, packed: Packed) -> Frames:
        leading = int(hasattr(tower.embeddings, "class_embedding"))
        bounds = pairwise(packed.frame_cu_seqlens.tolist())
        kept = sorted((end - start, start) for start, end in bounds if end > start)
        lengths, device = [count + leading for count, _ in kept], packed.index.device
        first = upload(cumulative(lengths)[:-1], device)
        shift = upload([start - leading for _, start in kept], device) - first
        rows = sum(lengths)
        source = torch.arange(rows, device=device)
        source = source + shift.repeat_interleave(upload(lengths, device), output_size=rows)
        return cls(leading, lengths, source.index_fill(0, first, -1) if leading else source)


def encode_frames(tower: Any, packed: Packed, table: Tensor) -> Tensor:
    """``last_hidden_state`` at the packed rows; ``table`` has the position embedding of each site of a frame."""
    frames, embeddings = Frames.of(tower, packed), tower.embeddings
    conv, width = embeddings.patch_embedding, packed.layout.grids[0][2] if packed.layout.videos else 1
    _, h, w = packed.positions[: frames.kept].unbind(-1)
    x = F.linear(packed.values[: frames.kept].to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)
    x = x + table.index_select(0, h * width + w + frames.leading)
    if frames.leading:
        x = torch.cat([(embeddings.class_embedding + table[0])[None], x])
    x = x.index_select(0, frames.source + frames.leading)
    if hasattr(tower, "pre_layrnorm"):
        x = tower.pre_layrnorm(x)
    for layer in tower.encoder.layers:
        x = x + attend(layer.self_attn, layer.layer_norm1(x), frames.lengths)
        x = x + layer.mlp(layer.layer_norm2(x))
    x = x if frames.leading else tower.post_layernorm(x)  # CLIP's is for its class token alone
    spare = packed.index.shape[0]  # the row that takes the class tokens
    rows = torch.where(frames.source < 0, spare, frames.source)
    return x.new_zeros(spare + 1, x.shape[1]).index_copy(0, rows, x)[:spare]


def position_table(tower: Any, layout: Layout, interpolate: bool) -> Tensor:
    """[sites, D], or with a class token [1 + sites, D]: the position embeddings of the videos' common grid."""
    embeddings, weight = tower.embeddings, tower.embeddings.position_embedding.weight
    side = embeddings.image_size // embeddings.patch_size
    sizes = {(h, w) for _, h, w in layout.grids} or {(side, side)}
    if sizes == {(side, side)}:
        return weight
    if len(sizes) > 1 or not interpolate:
        got = " and ".join(f"{h}x{w}" for h, w in sorted(sizes))
        raise ValueError(f"expected frames of {side}x{side} patches, or of one size and interpolated, got {got}")
    (h, w), leading = sizes.pop(), int(hasattr(embeddings, "class_embedding"))
    shape_alone = torch.empty(1, h * w + leading, weight.shape[1], device="meta")
    return embeddings.interpolate_pos_encoding(shape_alone, h * embeddings.patch_size, w * embeddings.patch_size)[0]


def attend(layer: Any, x: Tensor, lengths: list[int]) -> Tensor:
    """Self-attention of [rows, D] within consecutive segments of these lengths, with a layer's own projections."""
    q, k, v = (project(x).unflatten(1, (-1, layer.head_dim)) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    dropout = layer.dropout if layer.training else 0.0
    return layer.out_proj(segment_attention(q, k, v, lengths, dropout).flatten(1))


# Qwen2.5-VL: the library's own forward, told where the kept rows stand


@dataclass(frozen=True)
class Units:
    """The kept merge units of a Qwen2.5-VL tower.

    order: int64 [units], the units window after window, the library's ``window_index``.
    frames, windows: patches of each frame and of each window that kept any.
    """

    order: Tensor
    frames: list[int]
    windows: list[int]

    @classmethod
    def of(cls, tower: Any, packed: Packed) -> Units:
        bounds, unit = packed.frame_cu_seqlens, tower.spatial_merge_size**2
        counts = bounds.diff().tolist()
        row = torch.arange(sum(counts), device=bounds.device)
        frame = torch.searchsorted(bounds, row, right=True) - 1
        side = tower.window_size // tower.spatial_merge_size // tower.patch_size
        _, h, w = (packed.positions[: row.shape[0]] // side).unbind(-1)
        high, wide = (max((grid[axis] for grid in packed.layout.grids), default=1) for axis in (1, 2))
        window = (frame * high + h) * wide + w
        order = window.argsort(stable=True)
        windows = window[order].unique_consecutive(return_counts=True)[1].tolist()
        return cls(order, [unit * count for count in counts if count], [unit * count for count in windows])


def encode_units(tower: Any, packed: Packed) -> Tensor:
    """``pooler_output`` at the packed units."""
    units, merge = Units.of(tower, packed), tower.spatial_merge_size
    kept, device = units.order.shape[0], packed.index.device
    if not kept:
        return packed.values.new_zeros(packed.index.shape[0], tower.config.out_hidden_size, dtype=tower.dtype)
    step = torch.arange(merge, device=device)
    h, w = (packed.positions[:kept, axis, None] * merge + step for axis in (1, 2))
    position_ids = torch.stack(torch.broadcast_tensors(h[:, :, None], w[:, None, :]), -1).reshape(-1, 2)
    grid_thw = torch.tensor([(t, h * merge, w * merge) for t, h, w in packed.layout.grids])
    rows = tower(
        packed.values[:kept].reshape(kept * merge**2, -1),
        grid_thw=grid_thw,
        position_ids=position_ids,
        cu_seqlens=upload(cumulative(units.frames), device).to(torch.int32),
        max_seqlen=max(units.frames),
        window_index=units.order,
        cu_window_seqlens=upload(cumulative(units.windows), device).to(torch.int32),
        max_window_seqlen=max(units.windows),
        return_dict=True,
    ).pooler_output
    return F.pad(rows, (0, 0, 0, packed.index.shape[0] - kept))
