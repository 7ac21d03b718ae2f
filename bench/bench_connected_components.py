"""connected_components at real sizes: the edges of a video merge, one a row at most. Predicted, not measured, for an
H100: 20 to 40 µs for a million rows, which is what their random reads in its second-level cache take."""

from __future__ import annotations

import torch

from vtok.bench.workload import ROWS, Workload


def workloads() -> list[Workload]:
    return [
        *(batch(f"{size} rows, linked to the frame before", ROWS[size], 196) for size in ("50k", "1M")),
        batch("1M rows, linked anywhere", ROWS["1M"], 0),
    ]


def batch(name: str, rows: int, sites: int) -> Workload:
    def make(device: torch.device) -> tuple:
        row = torch.arange(rows, device=device)
        before = row - sites if sites else torch.randint(0, rows, (rows,), device=device)
        linked = torch.rand(rows, device=device) < (0.8 if sites else 0.5)
        return row, torch.where(linked, before, -1), rows

    return Workload(name, make, 24 * rows, roof=None)


def eager(source: torch.Tensor, target: torch.Tensor, n: int) -> torch.Tensor:
    """Labels that flow along the edges until none changes, which waits for the device each time."""
    real = (source >= 0) & (target >= 0)
    ends, label = torch.stack([source[real], target[real]]), torch.arange(n, device=source.device)
    while True:
        low = label[ends].amin(0).expand_as(ends).flatten()
        flowed = label.scatter_reduce(0, ends.flatten(), low, "amin")
        flowed = flowed[flowed]
        if torch.equal(flowed, label):
            return label
        label = flowed
