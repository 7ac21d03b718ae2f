"""pack in Triton: a program copies a few rows in column blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms


@triton.jit
def pack_kernel(tokens, index, out, rows, count, D, stride, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    row = tl.load(index + k, mask=k < count, other=-1)
    inside = (row >= 0) & (row < rows)
    row = tl.where(inside, row, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        values = tl.load(tokens + row[:, None] * stride + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0)
        tl.store(out + k[:, None] * D + d[None, :], values, mask=(k < count)[:, None] & (d < D)[None, :])


def pack(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    _rooms.ROOMS["pack"].check(tokens, index)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    rows, D = tokens.shape
    out = tokens.new_empty(index.shape[0], D)
    if out.numel():
        BLOCK_D = min(triton.next_power_of_2(D), 1024)
        grid = (triton.cdiv(index.shape[0], 4),)
        pack_kernel[grid](
            tokens, index.contiguous(), out, rows, index.shape[0], D, tokens.stride(0), BLOCK_K=4, BLOCK_D=BLOCK_D
        )
    return out
