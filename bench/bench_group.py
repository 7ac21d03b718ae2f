"""group at real sizes: four rows to a group on average, one row in twenty without one."""

from __future__ import annotations

import torch

from vtok.bench.workload import ROWS, Workload


def workloads() -> list[Workload]:
    return [batch(f"{size} rows, four to a group", ROWS[size]) for size in ("50k", "1M")]


def batch(name: str, rows: int) -> Workload:
    k = rows // 4

    def make(device: torch.device) -> tuple:
        assignment = torch.randint(0, k, (rows,), device=device)
        return assignment.masked_fill(torch.rand(rows, device=device) < 0.05, -1), k

    return Workload(name, make, 16 * rows + 8 * (k + 1), roof=None)


def eager(assignment: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stable argsort and a bincount, which waits for the device."""
    members = assignment.argsort(stable=True)
    counts = assignment[assignment >= 0].bincount(minlength=k)
    return members[len(assignment) - counts.sum() :], counts.cumsum(0)
