"""compact at real sizes: eight videos, a quarter of their rows kept at random, room for exactly those expected."""

from __future__ import annotations

import torch

from vtok.bench.workload import ROWS, Workload


def workloads() -> list[Workload]:
    return [batch(f"{size} bool, 25 %", ROWS[size]) for size in ("50k", "1M")]


def batch(name: str, rows: int, videos: int = 8) -> Workload:
    capacity = rows // 4

    def make(device: torch.device) -> tuple:
        keep = torch.rand(rows, device=device) < 0.25
        cu_seqlens = torch.arange(videos + 1, device=device) * (rows // videos)
        return keep, cu_seqlens, capacity

    return Workload(name, make, rows + 8 * capacity + 16 * videos, roof=None)


def eager(keep: torch.Tensor, cu_seqlens: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """nonzero and a sum per video: both wait for the device."""
    counts = [part.sum() for part in keep.split(cu_seqlens.diff().tolist())]
    return keep.nonzero()[:capacity, 0], torch.stack(counts)
