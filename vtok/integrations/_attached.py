"""A model that compresses its prompts by itself: a hook before forward, and a generate that keeps the caller's ids."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Attached:
    compress: Callable[[Any, dict], dict]
    hook: Any
    generate: Any  # what the instance had instead of its class's, if anything


@dataclass(frozen=True)
class _Prompt:
    """A prompt as the caller knows it and as the model saw it; it stays with the cache, for later turns."""

    given: Tensor
    shrunk: Tensor
    mask: Tensor

    def repeated(self, copies: int) -> _Prompt:
        return _Prompt(*(x.repeat_interleave(copies, 0) for x in (self.given, self.shrunk, self.mask)))


def attach_with(model: Any, compress: Callable[[Any, dict], dict]) -> None:
    detach(model)
    hook = model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model._vtok = _Attached(compress, hook, vars(model).get("generate"))
    model.generate = MethodType(_generate, model)


def detach(model: Any) -> None:
    """Give the model back its own ``generate`` and ``forward``; nothing happens to one that is not attached."""
    attached = vars(model).get("_vtok")
    if attached is None:
        return
    attached.hook.remove()
    del model._vtok, model.generate
    if attached.generate is not None:
        model.generate = attached.generate


def _before_forward(model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    names = inspect.signature(model.forward).parameters if args else ()
    inputs = dict(zip(names, args, strict=False)) | kwargs
    return ((), model._vtok.compress(model, inputs)) if _begins(inputs) else None


def _begins(inputs: dict) -> bool:
    """Whether this is a prompt with a video, and not a later turn."""
    return inputs.get("pixel_values_videos") is not None and not _cached(inputs)


def _cached(inputs: dict) -> bool:
    cache = inputs.get("past_key_values")
    return cache is not None and cache.get_seq_length() > 0


@torch.no_grad()
def _generate(self: Any, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
    generate = self._vtok.generate or MethodType(type(self).generate, self)
    given = kwargs.pop("input_ids", None) if inputs is None else inputs
    prompt = _first_turn(self, given, kwargs) if _begins(kwargs) else _later_turn(given, kwargs)
    if prompt is None:
        return generate(given, generation_config, *args, **kwargs)
    tail = given[:, prompt.given.shape[1] :]
    ids = torch.cat([prompt.shrunk, tail], 1)
    config, kwargs = _shortened(self, generation_config, kwargs, given.shape[1] - ids.shape[1])
    out = generate(ids, config, *args, **kwargs)
    sequences = out if isinstance(out, Tensor) else out.sequences
    copies = sequences.shape[0] // given.shape[0]
    cache = kwargs.get("past_key_values") if isinstance(out, Tensor) else out.get("past_key_values")
    if cache is not None:
        cache._vtok_prompt = prompt.repeated(copies)
    whole = torch.cat([given.repeat_interleave(copies, 0), sequences[:, ids.shape[1] :]], 1)
    if isinstance(out, Tensor):
        return whole
    out.sequences = whole
    return out


def _first_turn(model: Any, given: Tensor, kwargs: dict) -> _Prompt | None:
    """Compress what ``kwargs`` holds, in place; None where nothing is to be compressed."""
    shrunk = model._vtok.compress(model, {**kwargs, "input_ids": given})
    if not shrunk.packed:
        return None
    kwargs.clear()
    kwargs.update(shrunk)
    return _Prompt(given, kwargs.pop("input_ids"), kwargs["attention_mask"])


def _later_turn(given: Tensor | None, kwargs: dict) -> _Prompt | None:
    """The prompt that the cache holds, where these ids begin with it; the mask in ``kwargs`` is shrunk alike."""
    prompt = getattr(kwargs.get("past_key_values"), "_vtok_prompt", None) if _cached(kwargs) else None
    if prompt is None or given is None or not torch.equal(given[:, : prompt.given.shape[1]], prompt.given):
        return None
    if any(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos")):
        raise ValueError("expected no pixels together with a cache that holds a compressed prompt, got them")
    mask = torch.ones_like(given) if kwargs.get("attention_mask") is None else kwargs["attention_mask"]
    kwargs["attention_mask"] = torch.cat([prompt.mask, mask[:, prompt.given.shape[1] :].to(prompt.mask.dtype)], 1)
    kwargs.pop("mm_token_type_ids", None)  # what is new is text
    return prompt


def _shortened(model: Any, config: Any, kwargs: dict, dropped: int) -> tuple[Any, dict]:
    """Lengths that count the prompt, reduced by what the prompt lost; the caller's config stays as it is."""
    config = copy.deepcopy(config)
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length, counted = (_setting(name, kwargs, config, model.generation_config) for name in (total, new))
        if not length or counted is not None:
            continue
        if config is not None and kwargs.get(total) is None:
            setattr(config, total, max(length - dropped, 0))
        else:
            kwargs = {**kwargs, total: max(length - dropped, 0)}
    return config, kwargs


def _setting(name: str, kwargs: dict, *configs: Any) -> Any:
    """What generate goes by: its arguments first, then the config it is given, then the model's."""
    found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), None)
