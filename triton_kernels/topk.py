"""topk in Triton: a program per segment settles the last row's key a byte at a time, then compacts in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms


@triton.jit
def topk_keys(scores, LARGEST: tl.constexpr):
    """uint32 keys that grow with how good a score is; -0 and +0 share one, NaN has 0."""
    raw = scores.to(tl.uint32, bitcast=True)
    bits = raw if LARGEST else raw ^ 0x80000000
    keys = tl.where(bits > 0x80000000, ~bits, bits | 0x80000000)
    return tl.where((raw & 0x7FFFFFFF) > 0x7F800000, 0, keys)


@triton.jit
def topk_clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def topk_kernel(scores, cu_seqlens, cu_k, out, rows, segments, slots, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    v = tl.program_id(0).to(tl.int64)  # the last program has no rows: it pads what the segments leave of the output
    lanes, bins = tl.arange(0, BLOCK), tl.arange(0, 512)
    slot, end_slot = tl.load(cu_k + v), tl.load(cu_k + v + 1, mask=v < segments, other=slots)
    begin = topk_clamp(tl.load(cu_seqlens + v), 0, rows)
    end = topk_clamp(tl.load(cu_seqlens + v + 1, mask=v < segments, other=0), begin, rows)
    wanted = topk_clamp(end_slot - slot, 0, end - begin)
    slot, end_slot = topk_clamp(slot, 0, slots), topk_clamp(end_slot, 0, slots)

    prefix = tl.zeros([], tl.uint32)
    left = wanted  # to take among the rows whose key starts with the prefix
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros([512], tl.int64)  # of the next byte; the upper half takes what has another prefix
        for first in range(begin, end, BLOCK):
            row = first + lanes
            keys = topk_keys(tl.load(scores + row, mask=row < end, other=0), LARGEST)
            same = (row < end) & ((keys >> shift >> 8) == prefix)
            counts += tl.histogram(tl.where(same, (keys >> shift) & 255, 256).to(tl.int32), 512).to(tl.int64)
        counts = tl.where(bins < 256, counts, 0)
        byte = tl.sum(((bins < 256) & (tl.cumsum(counts, reverse=True) >= left)).to(tl.int32)) - 1
        left -= tl.sum(tl.where(bins > byte, counts, 0))
        prefix = (prefix << 8) | byte.to(tl.uint32)

    place = slot
    for first in range(begin, end, BLOCK):
        row = first + lanes
        keys = topk_keys(tl.load(scores + row, mask=row < end, other=0), LARGEST)
        same = (row < end) & (keys == prefix)
        chosen = (row < end) & (keys > prefix) | same & (tl.cumsum(same.to(tl.int32)) <= left)
        at = place + tl.cumsum(chosen.to(tl.int32)) - 1
        tl.store(out + at, row, mask=chosen & (at < slots))
        place += tl.sum(chosen.to(tl.int32))
        left -= tl.sum(same.to(tl.int32))
    for first in range(slot + wanted, end_slot, BLOCK):
        tl.store(out + first + lanes, -1, mask=first + lanes < end_slot)


def topk(
    scores: torch.Tensor, cu_seqlens: torch.Tensor, cu_k: torch.Tensor, k: int, *, largest: bool = True
) -> torch.Tensor:
    _rooms.ROOMS["topk"].check(scores, cu_seqlens, cu_k, k)
    out = cu_k.new_empty(k)
    if k:
        segments = cu_k.shape[0] - 1
        topk_kernel[(segments + 1,)](
            scores.contiguous(), cu_seqlens.contiguous(), cu_k.contiguous(), out, scores.shape[0], segments, k,
            LARGEST=largest, BLOCK=1024,
        )  # fmt: skip
    return out
