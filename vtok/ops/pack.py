"""pack: gather rows."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.ops import _check

SCHEMA = "pack(Tensor tokens, Tensor index) -> Tensor"


def pack(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather the chosen rows into one packed buffer.

    Args:
        tokens: any dtype, shape (S, D). Rows may be strided; columns that are not dense are copied first.
        index: int64, shape (K,), source rows in [-1, S), in any order, repeats allowed. -1 makes a row of zeros.

    Returns:
        Tensor of the dtype of ``tokens``, shape (K, D).

    Raises:
        RuntimeError: wrong rank, dtype or device; on the CPU also an index outside [-1, S). On other devices such a
            row is zeros, for looking would cost a sync.

    Equivalent to ``torch.where((index >= 0)[:, None], tokens[index.clamp(min=0)], 0)``.

    Moves 2·K·D·itemsize + 8·K bytes. Class E. Differentiable in ``tokens`` (backward is ``merge(reduce="sum")``).
    Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.pack(tokens, index)


def check(tokens: Tensor, index: Tensor) -> None:
    _check.expect_dim("pack", "tokens", tokens, 2, "(S, D)")
    _check.expect_index("pack", "index", index, tokens, "(K,)")


def reference(tokens: Tensor, index: Tensor) -> Tensor:
    check(tokens, index)
    rows = tokens.shape[0]
    _check.expect_all_in_range("pack", "index", index, rows)
    inside = (index >= 0) & (index < rows)
    out = tokens.new_zeros(index.shape[0], tokens.shape[1])
    return out if rows == 0 else torch.where(inside[:, None], tokens[index.clamp(0, rows - 1)], out)


def fake(tokens: Tensor, index: Tensor) -> Tensor:
    check(tokens, index)
    return tokens.new_empty(index.shape[0], tokens.shape[1])


def setup_context(ctx, inputs, output) -> None:
    tokens, index = inputs
    ctx.rows = tokens.shape[0]
    ctx.save_for_backward(index)


def backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    members, offsets = torch.ops.vtok.group(index, ctx.rows)
    values, _ = torch.ops.vtok.merge(grad.contiguous(), members, offsets, reduce="sum")
    return values, None
