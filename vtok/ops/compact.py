"""compact: the rows to keep, as a packed list."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.ops import _check

SCHEMA = "compact(Tensor keep, Tensor cu_seqlens, SymInt capacity) -> (Tensor index, Tensor counts)"


def compact(keep: Tensor, cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """List the rows that a mask keeps, in order, without asking the device how many there are.

    Args:
        keep: bool, shape (S,). Rows outside every segment are not kept, whatever the mask says.
        cu_seqlens: int64, shape (V+1,), ascending from 0 to at most S: segment (video) v is
            rows [cu_seqlens[v], cu_seqlens[v+1]).
        capacity: rows that ``index`` has room for.

    Returns:
        index: int64, shape (capacity,). The kept rows of all videos back to back, ascending, as far as they fit;
            then -1.
        counts: int64, shape (V,). Rows kept in each video. Not cut off by the capacity: a sum above it shows that
            rows were lost.

    Raises:
        RuntimeError: wrong rank, dtype or device, a capacity below 0; on the CPU also ``cu_seqlens`` that is not
            ascending from 0 to at most S. On other devices such boundaries give rows and counts without meaning
            but never leave the tensors, for looking would cost a sync.

    Equivalent to ``index = keep[: cu_seqlens[-1]].nonzero()[:, 0]``, cut or padded with -1 to ``capacity``, and
    ``counts = torch.stack([part.sum() for part in keep.tensor_split(cu_seqlens[1:])][:-1])``.

    Moves S + 8·capacity + 16·V bytes. Class E. Not differentiable. Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.compact(keep, cu_seqlens, capacity)


def check(keep: Tensor, cu_seqlens: Tensor, capacity: int) -> None:
    _check.expect_dim("compact", "keep", keep, 1, "(S,)")
    _check.expect_dtype("compact", "keep", keep, torch.bool)
    _check.expect_cu_seqlens("compact", "cu_seqlens", cu_seqlens, keep)
    _check.expect(capacity >= 0, "compact", "capacity >= 0", capacity)


def reference(keep: Tensor, cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    check(keep, cu_seqlens, capacity)
    rows = keep.shape[0]
    _check.expect_ascending("compact", "cu_seqlens", cu_seqlens, rows, "S")
    bounds = cu_seqlens.clamp(0, rows)
    row = torch.arange(rows, device=keep.device)
    kept = keep & (row < bounds[-1])
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))  # [S+1]: kept rows before row s
    slot = torch.where(kept, before[:-1], capacity).clamp(max=capacity)  # one slot too many takes what is dropped
    index = row.new_full((capacity + 1,), -1).scatter_(0, slot, row)[:capacity]
    return index.clone(), before[bounds].diff()


def fake(keep: Tensor, cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    check(keep, cu_seqlens, capacity)
    return cu_seqlens.new_empty(capacity), cu_seqlens.new_empty(cu_seqlens.shape[0] - 1)
