"""merge in Triton: a program takes one group and a block of columns, its members in list order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms
from vtok.triton_kernels._common import narrow


@triton.jit
def merge_kernel(
    tokens, members, offsets, weights, values, weight, rows, listed, D, stride,
    REDUCE: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    begin = tl.minimum(tl.maximum(tl.load(offsets + group), 0), listed)
    end = tl.minimum(tl.maximum(tl.load(offsets + group + 1), 0), listed)
    reduced = tl.full((BLOCK_D,), float("-inf") if REDUCE == "max" else 0, ACC)
    total = tl.full((), 0, ACC)
    found = tl.full((), 0, tl.int32)
    for start in range(begin, end, AHEAD):
        for i in tl.static_range(AHEAD):  # loads of several members are in flight; they are added in list order
            place = start + i
            row = tl.load(members + place, mask=place < end, other=-1)
            inside = (row >= 0) & (row < rows)
            row = tl.where(inside, row, 0)
            x = tl.load(tokens + row * stride + d, mask=d < tl.where(inside, D, 0), other=0).to(ACC)
            if weights is None:
                w = inside.to(ACC)
            else:
                w = tl.load(weights + row, mask=inside, other=0)
            if REDUCE == "max":
                reduced = tl.where(inside, tl.where((x > reduced) | (x != x), x, reduced), reduced)
            elif weights is None:
                reduced += x
            else:
                reduced += w * x
            total += w
            found += inside.to(tl.int32)
    if REDUCE == "mean":
        divisor = tl.where(total == 0, 1, total)
        mean = reduced / divisor if reduced.dtype == tl.float64 else tl.div_rn(reduced, divisor)
        reduced = tl.where(total == 0, 0, mean)
    reduced = tl.where(found == 0, 0, reduced)
    tl.store(values + group * D + d, narrow(reduced, values.dtype.element_ty), mask=d < D)
    tl.store(weight + group, total, mask=tl.program_id(1) == 0)


def merge(
    tokens: torch.Tensor,
    members: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    reduce: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    room = _rooms.ROOMS["merge"]
    room.check(tokens, members, offsets, weights, reduce)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    (rows, D), groups = tokens.shape, offsets.shape[0] - 1
    values = tokens.new_empty(groups, D)
    weight = tokens.new_empty(groups, dtype=room.accumulator(tokens.dtype))
    if groups:
        BLOCK_D = max(min(triton.next_power_of_2(D), 512), 1)
        merge_kernel[groups, max(triton.cdiv(D, BLOCK_D), 1)](
            tokens, members.contiguous(), offsets.contiguous(), None if weights is None else weights.contiguous(),
            values, weight, rows, members.shape[0], D, tokens.stride(0), REDUCE=reduce,
            ACC=tl.float64 if tokens.dtype == torch.float64 else tl.float32, AHEAD=4, BLOCK_D=BLOCK_D,
            num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return values, weight
