"""vLLM's video pruning by a method of vtok: a plugin that vLLM loads by itself where vtok is installed.

    VTOK_VLLM_METHOD=evs vllm serve Qwen/Qwen2.5-VL-7B-Instruct --video-pruning-rate 0.75

``VTOK_VLLM_METHOD`` is a name from ``vtok methods``; without it nothing happens. ``VTOK_VLLM_OPTIONS`` is a JSON object
of the method's own options, such as ``{"compat": "vllm"}``. Set them for every process of the engine.

The engine has no registry of pruning methods, so its EVS mask function is replaced, in its module and wherever a loaded
``vllm`` module holds it by name (Qwen2.5-VL, Qwen3-VL, Nemotron Nano VL). The engine plans the counts before there are
embeddings, and goes on doing so by its own rule: a method must score rows and keep exactly that many. What merges rows,
needs a query or has a budget of its own is refused when the engine starts.

Written for vLLM 0.33. What stays the engine's, and is stated here rather than repaired:

* Positions of the kept rows ride in extra columns of the embeddings: in bfloat16 they are rounded above 256.
* In the pruned path of Qwen2.5-VL the seconds per grid step are cut to an integer: below one second every frame gets
  t = 0.
* Pruning is broken for Qwen3.5. ``--video-pruning-method vidcom2`` has a mask function of its own, which stays.
* The method is in no cache key: clear external KV stores when it changes.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vtok.integrations.evs import retained_tokens_count, retention_mask

METHOD, OPTIONS = "VTOK_VLLM_METHOD", "VTOK_VLLM_OPTIONS"
ENGINE, MASK, COUNT = "vllm.multimodal.video_prune.evs", "compute_retention_mask", "compute_retained_tokens_count"


def register() -> None:
    """Put the method of ``VTOK_VLLM_METHOD`` in the place of the engine's EVS mask; vLLM calls this in every process.

    A second call changes nothing. Raises ValueError for a method or options that don't fit, RuntimeError for an engine
    without that function: before a model is loaded.
    """
    method = os.environ.get(METHOD)
    if not method:
        return
    options = _options()
    _expect_score_and_keep(method, options)
    engine = _engine()
    original = getattr(engine, MASK)
    if getattr(original, "vtok_method", None) is None:
        _replace(original, _mask_function(engine, method, options))


def _options() -> dict[str, Any]:
    text = os.environ.get(OPTIONS) or "{}"
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"expected {OPTIONS} to be a JSON object, got {text!r}")
    return options


def _expect_score_and_keep(method: str, options: dict[str, Any]) -> None:
    """Try the method on a small clip: what can't give a mask from embeddings and a rate alone says so now."""
    frames, side, q = 4, 4, 0.6
    rows = torch.arange(frames * side * side * 8, dtype=torch.float32, device="cpu").sin().view(-1, 8)
    fits = f"expected {METHOD} to name a method that scores rows and keeps as many as the engine plans, got {method!r}"
    try:
        mask = retention_mask(rows, (frames, side, side), 1, q, method=method, **options)
    except Exception as error:
        raise ValueError(f"{fits}: {error}") from error
    want = retained_tokens_count(side * side, frames, q)
    if mask.shape != (len(rows),) or mask.dtype != torch.bool or int(mask.sum()) != want:
        raise ValueError(f"{fits}, which kept {int(mask.sum())} rows of a planned {want}")


def _engine() -> ModuleType:
    """The engine's module, its functions with the arguments that we know."""
    try:
        engine = importlib.import_module(ENGINE)
    except ImportError as error:
        raise RuntimeError(f"expected vLLM 0.33 for {METHOD}, got one without {ENGINE}: {error}") from error
    for name, ours in ((MASK, retention_mask), (COUNT, retained_tokens_count)):
        theirs = list(inspect.signature(getattr(engine, name, lambda: None)).parameters)
        known = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if theirs != known:
            raise RuntimeError(f"expected {ENGINE}.{name} of vLLM 0.33 with the arguments {known}, got {theirs}")
    return engine


def _mask_function(engine: ModuleType, method: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    def compute_retention_mask(video_embeds: Tensor, video_size_thw: Any, spatial_merge_size: int, q: float) -> Tensor:
        mask = retention_mask(video_embeds, video_size_thw, spatial_merge_size, q, method=method, **options)
        frames, height, width = (int(side) for side in video_size_thw)
        sites = (height // spatial_merge_size) * (width // spatial_merge_size)
        ours, planned = (count(sites, frames, q) for count in (retained_tokens_count, getattr(engine, COUNT)))
        if ours != planned:  # host integers both; the prompt has already been laid out for theirs
            raise RuntimeError(f"expected the engine to plan {ours} rows of {frames} x {sites} at {q}, got {planned}")
        return mask

    compute_retention_mask.vtok_method = method  # type: ignore[attr-defined]
    return compute_retention_mask


def _replace(original: Callable, ours: Callable) -> None:
    """In every loaded module of the engine: models bind the function by name."""
    for name, module in list(sys.modules.items()):
        if name == "vllm" or name.startswith("vllm."):
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if value is original:
                    setattr(module, attribute, ours)
