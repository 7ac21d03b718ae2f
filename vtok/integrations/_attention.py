"""Attention within segments of packed rows, without padding."""

from __future__ import annotations

from itertools import groupby
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from vtok.layout import cumulative, upload


def segment_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √d) v of [rows, heads, d] within consecutive segments of these lengths, the empty ones left out.

    Costs what the segments cost, one by one. PyTorch's own flash attention takes them all in one launch; where it does
    not run, neighbouring segments of one length are a batch: sort them, and few calls remain. On a CPU one frame of
    196 rows beside 31 of 44 took a seventh of the time of padding to the longest with a mask, and 32 that are alike
    four fifths; jagged tensors took four times as long and more.
    """
    if not lengths:
        return torch.zeros_like(q)
    return varlen(q, k, v, lengths) if has_varlen(q) and not dropout else batched(q, k, v, lengths, dropout)


def batched(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout: float) -> Tensor:
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    parts = [x.split([length * count for length, count in runs]) for x in (q, k, v)]
    mixed = []
    for (length, count), *part in zip(runs, *parts, strict=True):
        query, key, value = (x.unflatten(0, (count, length)).transpose(1, 2) for x in part)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed)


def varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = upload(cumulative(lengths), q.device).to(torch.int32)
    return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths)))


def has_varlen(q: Tensor) -> bool:
    """Whether PyTorch's flash attention takes heads like these."""
    if q.device.type != "cuda" or torch.version.hip or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return q.shape[2] % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)
