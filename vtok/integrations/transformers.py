"""transformers: compress the video tokens of a model's inputs before its language model sees them.

    shrunk = compress_inputs(model, inputs, budget="25%")    # and then model.generate(**shrunk) or model(**shrunk)
    attach(model, budget="25%")                              # or once: generate and forward do it by themselves

Videos are encoded by the model's own tower, compressed by ``vtok.compress``, and the prompt shrunk to the placeholders
that stay; what is left travels through the library's own argument ``mm_encoder_outputs``. No forward is replaced.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtok.budget import Grid
from vtok.compress import compress
from vtok.integrations._attached import attach_with, detach
from vtok.integrations._prompt import Kept, full_positions, offset, with_text
from vtok.layout import Layout, host_grids
from vtok.packed import Packed

__all__ = ["CompressedInputs", "attach", "compress_inputs", "detach"]

NEEDED = (5, 18)  # the first version whose generate and forward both take mm_encoder_outputs
REPEATS_BY_SAMPLE = (5, 19)  # before, beams repeated every piece of mm_encoder_outputs for itself
SEEN_BY_THE_TOWER = (
    "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts",
    "image_sizes", "image_sizes_videos", "batch_num_images",
)  # fmt: skip


class CompressedInputs(dict):
    """Inputs for ``generate`` or ``forward``; ``packed`` has one Packed per video, in order."""

    packed: list[Packed]


@dataclass(frozen=True)
class Family:
    """What differs between classes of models.

    grids: (t, h, w) of each video in rows of features. extra_rows: rows after each grid. listed: whether features
    travel as a list with one tensor per video.
    """

    grids: Callable[[Any, dict], list[Grid] | None]
    extra_rows: int
    listed: bool


def compress_inputs(
    model: Any,
    inputs: Any,
    *,
    budget: Any = None,
    method: str = "evs",
    packed: list[Packed] | None = None,
    **settings: Any,
) -> CompressedInputs:
    """Encode the videos of a prompt, keep the rows that ``budget`` pays for, and shrink the prompt to them.

    Args:
        model: a Qwen2_5_VLForConditionalGeneration or LlavaOnevisionForConditionalGeneration.
        inputs: what the processor returned (any mapping), with labels if you train. Not changed.
        budget, method, settings: as in ``vtok.compress``: also total_budget, threshold, min_per_frame, scores (one per
            row of all videos) and the method's options. Without budget, total_budget and threshold nothing is done.
            The newline row after each video of LLaVA-OneVision always stays, outside the budget.
        packed: instead of a budget: the videos of this prompt as compressed before, in order, for example by
            ``Packed.load``. The tower does not run for them; pixel_values_videos may be missing.

    Returns:
        CompressedInputs, a new dict. input_ids, attention_mask, mm_token_type_ids, token_type_ids and labels lack the
        columns of the dropped placeholders; samples that lose more are padded on the side where the batch was padded
        already, otherwise on the left. Pixels, grids and sizes of videos and images give way to
        ``mm_encoder_outputs``. Qwen2.5-VL gets position_ids [4, B, L]: the text's, then the integers of the model's own
        get_rope_index (or position_ids of the inputs) for the rows that stay; LLaVA-OneVision counts anew.
        ``packed`` is a list with one Packed per video. Differentiable in the tower's parameters.

    Also sets ``model.model.rope_deltas`` of Qwen2.5-VL, as generate does, for later turns from the cache. With beams or
    num_return_sequences generate expands ``mm_encoder_outputs`` in place: use a result for one such call only.
    Without attention_mask all tokens count. prefill_chunk_size needs transformers 5.23: generate forgot what was
    encoded before.

    Waits for the device: for the grids if they lie there, for the rows that each video kept, and, since prompts have
    to be cut, for the placeholders and the columns that stay in each sample.

    Raises:
        TypeError: another class of model. ImportError: transformers before 5.18. ValueError: inputs that do not fit,
            and whatever ``vtok.compress`` refuses.
    """
    family, result = family_of(model), CompressedInputs(inputs)
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    result.packed = []
    wanted = any(rule is not None for rule in (budget, settings.get("total_budget"), settings.get("threshold")))
    if (packed is None and not wanted) or not (packed or result.get("pixel_values_videos") is not None):
        return result
    _expect_inputs(result)
    grids = family.grids(model, result)
    if packed is None:
        rows = _rows(_encode(model.model.get_video_features, result))
        layout = Layout.from_grid(grids, extra_rows=family.extra_rows, device=rows.device)
        packed = [compress(rows, layout, budget=budget, method=method, **settings)]
    elif wanted:
        raise ValueError("expected one of packed and a budget, got both")
    else:
        _expect_videos(packed, grids, family.extra_rows)
    result.packed = [video for some in packed for video in some.split()]
    kept = Kept.of(result, model.config.video_token_id, result.packed)
    encoded = {"video": _pieces(result.packed, kept.rows, family.listed)}
    if result.get("pixel_values") is not None:
        encoded["image"] = _encode(model.model.get_image_features, result)
    positions, before = full_positions(model, result), result.get("attention_mask")
    kept.shrink(result, _pad_token(model))
    if positions is not None:
        model.model.rope_deltas = offset(positions, before, result["attention_mask"])
        result["position_ids"] = with_text(kept.of_each(positions, 0), result["attention_mask"])
    result["mm_encoder_outputs"] = {
        **(result.get("mm_encoder_outputs") or {}),
        **{name: BaseModelOutputWithPooling(pooler_output=features) for name, features in encoded.items()},
    }
    for name in SEEN_BY_THE_TOWER:
        result.pop(name, None)
    return result


def attach(model: Any, *, budget: Any = None, method: str = "evs", **settings: Any) -> None:
    """Make ``model.generate`` and ``model(...)`` compress every video they are given, until ``detach(model)``.

    Args: as in ``compress_inputs``, kept for every call. A model that is attached already gets the new settings.

    Both act when there are pixels of videos and the cache is empty, and leave every other call alone.
    ``generate`` returns the original prompt and then the new tokens, also as ``.sequences``; max_length and min_length
    count the original prompt. Streamers, logits processors, stopping criteria and all other outputs see the shrunk one.
    A later turn from the cache takes either the whole sequence as returned, and more, or the new tokens alone with an
    attention mask as long as the cache and they. ``forward`` returns the logits of the shrunk prompt.
    """
    family_of(model)
    settings = {"budget": budget, "method": method, **settings}
    attach_with(model, partial(compress_inputs, **settings))


def family_of(model: Any) -> Family:
    """What to know about this class of model; refuses other classes, and libraries that are too old."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            if _older_than(NEEDED):
                raise ImportError(f"vtok.integrations.transformers needs transformers 5.18 or newer, got {_version()}")
            return FAMILIES[cls.__name__]
    raise TypeError(f"expected a model of class {' or '.join(FAMILIES)}, got {type(model).__name__}")


def _version() -> str:
    from transformers import __version__

    return __version__


def _older_than(version: tuple[int, int]) -> bool:
    return tuple(int(part) for part in _version().split(".")[:2]) < version


def _qwen_grids(model: Any, inputs: dict) -> list[Grid]:
    grid = inputs.get("video_grid_thw")
    if grid is None:
        raise ValueError("expected video_grid_thw in the inputs, got none")
    return host_grids(grid.cpu() if isinstance(grid, Tensor) else grid, model.config.vision_config.spatial_merge_size)


def _llava_grids(model: Any, inputs: dict) -> list[Grid] | None:
    """The grids after the model's pooling; None without pixels: nothing else tells the frames."""
    if inputs.get("pixel_values_videos") is None:
        return None
    videos, frames = inputs["pixel_values_videos"].shape[:2]
    vision = model.config.vision_config
    side = math.ceil(vision.image_size // vision.patch_size / 2)
    return [(frames, side, side)] * videos


FAMILIES = {
    "Qwen2_5_VLForConditionalGeneration": Family(_qwen_grids, extra_rows=0, listed=True),
    "LlavaOnevisionForConditionalGeneration": Family(_llava_grids, extra_rows=1, listed=False),
}


def _expect_inputs(inputs: dict) -> None:
    if inputs.get("input_ids") is None:
        raise ValueError("expected input_ids in the inputs, got none")
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"expected attention_mask of shape {tuple(ids.shape)}, got {tuple(mask.shape)}")


def _expect_videos(packed: list[Packed], grids: list[Grid] | None, extra_rows: int) -> None:
    """That the videos compressed before are those of this prompt, as far as the inputs tell."""
    got = [grid for some in packed for grid in some.layout.grids]
    for some in packed:
        if some.layout.extra_rows != extra_rows:
            raise ValueError(f"expected packed with extra_rows={extra_rows}, got {some.layout.extra_rows}")
    if grids is not None and got != grids:
        raise ValueError(f"expected packed of videos with the grids {grids}, got {got}")


def _encode(get_features: Callable, inputs: dict) -> Any:
    """What the tower and the projector make of the inputs, called as generate calls them."""
    names = inspect.signature(get_features).parameters
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}
    return get_features(**given, return_dict=True).pooler_output


def _rows(features: Any) -> Tensor:
    """Features as rows [S, D] in the order of the placeholders."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return features[0] if len(features) == 1 else torch.cat(list(features))


def _pieces(packed: list[Packed], rows: list[int], listed: bool) -> Any:
    """The kept rows in the library's own container: a list of [K, D], or one tensor [pieces, K, D] that it flattens.

    No piece spans two samples: beams repeat pieces, sample by sample.
    """
    values = packed[0].values if len(packed) == 1 else torch.cat([video.values for video in packed])
    sizes = [size for size in rows if size] or [0]
    if listed:
        return list(values.split(sizes))
    if len(set(sizes)) > 1 and _older_than(REPEATS_BY_SAMPLE):
        raise ValueError(f"expected as many rows in each sample before transformers 5.19, got {sizes}")
    return values.unflatten(0, (-1, math.gcd(*sizes)))


def _pad_token(model: Any) -> int:
    """A token that is no placeholder: nothing attends to it."""
    found = (model.generation_config.pad_token_id, getattr(model.config.get_text_config(), "pad_token_id", None))
    return next((token for token in found if token is not None), 0)
