"""A prompt without the placeholders of dropped rows: which columns stay, and what becomes of each input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok.packed import Packed

FILLS = {"attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0, "labels": -100}


@dataclass(frozen=True)
class Kept:
    """Which columns of a prompt of B samples stay.

    column: int64 [B, L'], where each new column comes from. dropped: bool [B, L'], padding that was a placeholder.
    rows: B ints, the placeholders that stay in each sample.
    """

    column: Tensor
    dropped: Tensor
    rows: list[int]

    @staticmethod
    def of(inputs: dict, video_token: int, packed: list[Packed]) -> Kept:
        """Waits for the device once. Padding stays on its side, and comes in on the left where there was none."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        is_video = ids == video_token
        stays = torch.cat([video.mask.to(ids.device) for video in packed])
        row = (is_video.flatten().cumsum(0) - 1).clamp(0, stays.shape[0] - 1).view_as(ids)  # of each placeholder
        keep = torch.where(is_video, stays[row], real)
        counts = [is_video.sum()[None], (~real[:, -1:]).sum()[None], keep.sum(1), (keep & is_video).sum(1)]
        placeholders, right_padded, *lengths = torch.cat(counts).tolist()
        if placeholders != stays.shape[0]:
            raise ValueError(f"expected {stays.shape[0]} video placeholders in input_ids, got {placeholders}")
        lengths, rows = lengths[: len(ids)], lengths[len(ids) :]
        columns = slice(0, max(lengths)) if right_padded else slice(ids.shape[1] - max(lengths), None)
        column = (keep != bool(right_padded)).to(torch.uint8).argsort(dim=1, stable=True)[:, columns]
        return Kept(column, (is_video & ~keep).gather(1, column), rows)

    def of_each(self, x: Tensor, fill: int) -> Tensor:
        """The columns of ``x`` [..., B, L] that stay, ``fill`` where a placeholder was dropped."""
        return x.gather(-1, self.column.expand(*x.shape[:-2], -1, -1)).masked_fill(self.dropped, fill)

    def shrink(self, inputs: dict, pad_token: int) -> None:
        """Cut everything in ``inputs`` that has one entry per token; there is an attention_mask afterwards."""
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name, fill in {"input_ids": pad_token, **FILLS}.items():
            if inputs.get(name) is not None:
                inputs[name] = self.of_each(inputs[name], fill)


def full_positions(model: Any, inputs: dict) -> Tensor | None:
    """int64 [3, B, L], the model's positions of the whole prompt; None where it counts in one dimension."""
    given = inputs.get("position_ids")
    if not hasattr(model.model, "get_rope_index"):
        if given is not None:
            raise ValueError(f"expected inputs of {type(model).__name__} without position_ids, got them")
        return None
    if given is not None:
        if given.dim() != 3:
            raise ValueError(f"expected position_ids of shape (3 or 4, B, L), got {tuple(given.shape)}")
        return given[-3:]
    if inputs.get("mm_token_type_ids") is None:
        raise ValueError("expected mm_token_type_ids in the inputs, got none: positions follow from them")
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    return model.model.get_rope_index(inputs["input_ids"], **{name: inputs.get(name) for name in names})[0]


def with_text(positions: Tensor, mask: Tensor) -> Tensor:
    """[4, B, L]: the text's positions, which the library builds its masks from, before the model's three."""
    return torch.cat([(mask.long().cumsum(1) - 1).masked_fill(mask == 0, 0)[None], positions])


def offset(positions: Tensor, before: Tensor | None, after: Tensor) -> Tensor:
    """int64 [B, 1], the model's rope_deltas: what later turns add to the number of tokens before them."""
    real = positions if before is None else positions.masked_fill(before == 0, 0)
    return real.amax((0, 2))[:, None] + 1 - after.long().sum(1, keepdim=True)
