"""The vision tower of a transformers model as a token source: SigLIP, CLIP or Qwen2.5-VL, from a folder or the hub.

A model is not trusted: no code that comes with it or that it names runs, no pickle is opened, and sizes are checked
before memory is asked for. Of a full checkpoint only the tower is read, and only from the files that hold it. Whatever
is wrong is one sentence, an EncoderError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok.checkpoint import Checkpoint, EncoderError

BATCH_PIXELS = 1 << 21  # of the frames that go through the tower at a time
LIMIT = 1 << 12  # of the sizes below; beyond it a config lies
SIZES = ("num_hidden_layers", "patch_size", "image_size", "spatial_merge_size", "temporal_patch_size")
UNREAD = ("auto_map", "quantization_config")  # what a tower's config may say and nobody asks
PREFIXES = ("", "vision_model.", "visual.", "model.visual.")  # of the tower's weights in a file
Colours = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


@dataclass(frozen=True)
class Family:
    """What the towers of one kind share; the published colours serve where a model names none."""

    title: str
    colours: Colours
    rows: Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Encoder:
    """A loaded tower. ``patch`` pixels each way and ``tubelet`` frames make a token; ``size`` is the side of the
    pictures that the tower was trained on, or None where any size is native to it."""

    name: str
    family: Family
    tower: nn.Module
    patch: int
    tubelet: int
    size: int | None
    colours: Colours

    def __call__(self, frames: Tensor, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """Tokens (1, T/tubelet, H/patch, W/patch, D) of uint8 frames (T, H, W, 3) that whole tokens tile.

        SigLIP: the last layer, normalised. CLIP: the last layer without the class row. Qwen2.5-VL: what its language
        model gets, after the 2x2 merge. For frames of another shape than its training pictures the library
        interpolates the positions of SigLIP and CLIP. Goes batch by batch; ``progress`` hears of frames done and of
        all. Device and dtype are the tower's. Raises EncoderError.
        """
        count, height, width, _ = frames.shape
        if count % self.tubelet or height % self.patch or width % self.patch:
            token = f"{self.tubelet} frames of {self.patch}x{self.patch}"
            raise EncoderError(f"expected frames that tokens of {token} pixels tile, got {count} of {width}x{height}")
        batch = max(1, BATCH_PIXELS // (height * width * self.tubelet)) * self.tubelet
        tokens = []
        try:
            with torch.inference_mode():
                for some in frames.split(batch):
                    rows = self.family.rows(self.tower, self._normalised(some))
                    grid = (some.shape[0] // self.tubelet, height // self.patch, width // self.patch)
                    tokens.append(rows.reshape(*grid, rows.shape[-1]))
                    progress(sum(map(len, tokens)) * self.tubelet, count)
        except Exception as error:  # a config can ask for anything
            raise EncoderError(f"expected {self.name!r} to encode the frames, got {_reason(error)}") from error
        return torch.cat(tokens)[None]

    def _normalised(self, frames: Tensor) -> Tensor:
        """uint8 (T, H, W, 3) to (T, 3, H, W) as the tower was trained on."""
        weight = next(self.tower.parameters())
        mean, std = (torch.tensor(values, device=weight.device) for values in self.colours)
        return ((frames.to(weight.device) / 255 - mean) / std).permute(0, 3, 1, 2).to(weight.dtype)


def _siglip_rows(tower: nn.Module, pixels: Tensor) -> Tensor:
    return tower(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state


def _clip_rows(tower: nn.Module, pixels: Tensor) -> Tensor:
    return tower(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]


def _qwen_rows(tower: nn.Module, pixels: Tensor) -> Tensor:
    """Patches go in the order in which they merge: (t, h/m, w/m, m, m), each as (channel, frame, y, x)."""
    config: Any = tower.config
    side, merge, span = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    count, channels, height, width = pixels.shape
    t, h, w = count // span, height // side, width // side
    cut = pixels.reshape(t, span, channels, h // merge, merge, side, w // merge, merge, side)
    patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
    return tower(patches, grid_thw=torch.tensor([[t, h, w]], device=pixels.device)).pooler_output


HALVES: Colours = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI: Colours = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
FAMILIES = {
    "siglip_vision_model": Family("SigLIP", HALVES, _siglip_rows),
    "clip_vision_model": Family("CLIP", OPENAI, _clip_rows),
    "qwen2_5_vl_vision": Family("Qwen2.5-VL", OPENAI, _qwen_rows),
}
TOWERS = {"siglip": "siglip_vision_model", "clip": "clip_vision_model", "qwen2_5_vl": "qwen2_5_vl_vision"}


def load(name: str, device: torch.device | str = "cpu") -> Encoder:
    """The tower of the model in a folder, or with a hub id where no such folder is, ready to run.

    float32 on the CPU, elsewhere the dtype of its weights. Raises EncoderError: no such model, no vision tower or one
    of another family, weights that are missing, damaged, of other shapes or there as a pickle alone, no transformers,
    no way to the hub.
    """
    try:
        import huggingface_hub
        import transformers
    except ImportError as error:
        raise EncoderError(f"expected transformers for an encoder (pip install transformers), got: {error}") from error
    try:
        with _quiet(transformers.utils.logging, huggingface_hub.utils.logging):
            return _load(transformers, Checkpoint(name), torch.device(device))
    except EncoderError:
        raise
    except Exception as error:  # what a library raises over a hostile file is its secret
        raise EncoderError(f"expected a vision model that loads, got {name!r}: {_reason(error)}") from error


def _load(transformers: Any, model: Checkpoint, device: torch.device) -> Encoder:
    family, config = _config(transformers, model)
    safe = {"attn_implementation": "sdpa"}  # a config may name attention code on the hub
    with torch.device("meta"):
        blank = transformers.AutoModel.from_config(config, trust_remote_code=False, **safe)
    weights = model.weights({key: tuple(value.shape) for key, value in blank.state_dict().items()}, PREFIXES)
    dtype = torch.float32 if device.type == "cpu" else next(iter(weights.values())).dtype
    with _without_bars(transformers.utils.logging):
        tower = type(blank).from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **safe)
    patch = config.patch_size * getattr(config, "spatial_merge_size", 1)
    tubelet, size = getattr(config, "temporal_patch_size", 1), getattr(config, "image_size", None)
    return Encoder(model.name, family, tower.to(device).eval(), patch, tubelet, size, _colours(model, family))


def _config(transformers: Any, model: Checkpoint) -> tuple[Family, Any]:
    """The family and the tower's part of the config; no other part of it is looked at."""
    whole = model.json("config.json")
    if whole is None:
        where = "in the folder" if model.local else "in the hub's cache, nor on the hub if it can be reached"
        raise EncoderError(f"expected a vision model, got {model.name!r}, which has no config.json {where}")
    kind = str(whole.get("model_type"))
    if kind in TOWERS:
        whole = (whole.get("vision_config") or {}) | (whole.get("vision_config_dict") or {})  # the older name wins
    kind = TOWERS.get(kind, kind)
    if kind not in FAMILIES:
        known = ", ".join(family.title for family in FAMILIES.values())
        raise EncoderError(f"expected a model with a vision tower ({known}), got {model.name!r} of the type {kind!r}")
    blank = transformers.AutoConfig.for_model(kind)
    config = type(blank).from_dict({key: value for key, value in whole.items() if key not in UNREAD})
    for key in SIZES:
        size = getattr(config, key, 1)
        if type(size) is not int or not 1 <= size <= LIMIT:
            raise EncoderError(f"expected {key} in [1, {LIMIT}] in the config of {model.name!r}, got {size!r}")
    return FAMILIES[kind], config


def _colours(model: Checkpoint, family: Family) -> Colours:
    """Mean and standard deviation as the model's processor says, or else the published ones."""
    said: dict = {}
    for filename in ("preprocessor_config.json", "processor_config.json"):
        whole = model.json(filename) or {}
        said |= whole.get("image_processor", whole)
    mean, std = said.get("image_mean", family.colours[0]), said.get("image_std", family.colours[1])
    if not all(len(values) == 3 and all(map(math.isfinite, values)) for values in (mean, std)) or min(std) <= 0:
        raise EncoderError(f"expected 3 channels of image_mean and image_std in {model.name!r}, got {mean!r}, {std!r}")
    return tuple(mean), tuple(std)


@contextmanager
def _quiet(*loggings: Any) -> Iterator[None]:
    """The libraries' notices held back: an error is one sentence."""
    before = [logging.get_verbosity() for logging in loggings]
    for logging in loggings:
        logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for logging, level in zip(loggings, before, strict=True):
            logging.set_verbosity(level)


@contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
