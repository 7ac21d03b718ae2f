"""group: from an assignment of rows to the list of each group's members."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.ops import _check

SCHEMA = "group(Tensor assignment, SymInt k) -> (Tensor members, Tensor offsets)"


def group(assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """List the rows of each group: a stable counting sort.

    Args:
        assignment: int64, shape (S,), the group of each row. Rows with a value outside [0, k) belong to none.
        k: number of groups; groups may be empty.

    Returns:
        members: int64, shape (S,). The rows of group 0, then those of group 1, and so on, ascending in each group;
            -1 in the slots that the rows without a group leave at the end.
        offsets: int64, shape (k+1,). Group g is ``members[offsets[g]:offsets[g+1]]``; offsets[k] rows have a group.

    Raises:
        RuntimeError: wrong rank or dtype, k below 0.

    Equivalent to ``members = assignment.argsort(stable=True)`` and
    ``offsets = assignment.bincount(minlength=k).cumsum(0)`` after a zero, where every row has a group.

    Moves 16·S + 8·(k+1) bytes. Class E. Not differentiable. Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.group(assignment, k)


def check(assignment: Tensor, k: int) -> None:
    _check.expect_dim("group", "assignment", assignment, 1, "(S,)")
    _check.expect_dtype("group", "assignment", assignment, torch.int64)
    _check.expect(k >= 0, "group", "k >= 0", k)


def reference(assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check(assignment, k)
    key = torch.where((assignment >= 0) & (assignment < k), assignment, k)
    key, row = key.sort(stable=True)
    return torch.where(key < k, row, -1), torch.searchsorted(key, torch.arange(k + 1, device=key.device))


def fake(assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check(assignment, k)
    return assignment.new_empty(assignment.shape[0]), assignment.new_empty(k + 1)
