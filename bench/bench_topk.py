"""topk at real sizes: a quarter of the scores, of one clip and of a ragged batch, with and without ties."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vtok.bench.workload import ROWS, Workload

BARS = {"cuda": {"launches": 4}}
TIES = 3  # times the bar, where all scores are equal


def workloads() -> list[Workload]:
    around = ROWS["16k"]
    sizes = {
        "50k": ([ROWS["50k"]], 25),
        "1M": ([ROWS["1M"]], 60),
        "64 ragged of 16k": ([around + around // 32 * (v % 17 - 8) for v in range(64)], 25),  # 12k to 20k
        "256 frames of 196": ([196] * 256, None),
    }
    drawn = [segments(name, lengths, torch.rand, limit) for name, (lengths, limit) in sizes.items()]
    ties = [segments(f"{name}, all equal", n, equal, limit * TIES) for name, (n, limit) in sizes.items() if limit]
    return drawn + ties


def equal(rows: int, device: torch.device) -> torch.Tensor:
    return torch.full((rows,), 0.25, device=device)


def segments(name: str, lengths: list[int], scores: Callable[..., torch.Tensor], limit_us: float | None) -> Workload:
    rows, kept = sum(lengths), [n // 4 for n in lengths]

    def make(device: torch.device) -> tuple:
        cu_seqlens, cu_k = (torch.tensor([0, *sizes]).cumsum(0).to(device) for sizes in (lengths, kept))
        return scores(rows, device=device), cu_seqlens, cu_k, sum(kept)

    moved = 4 * rows + 8 * sum(kept) + 16 * (len(lengths) + 1)
    return Workload(f"{name} fp32, 25 %", make, moved, roof=None, limit_us=limit_us)


def eager(scores: torch.Tensor, cu_seqlens: torch.Tensor, cu_k: torch.Tensor, k: int) -> torch.Tensor:
    """The retention mask of the serving engines, video by video; every slot is filled."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for begin, end, kept in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), cu_k.diff().tolist(), strict=True):
        order = scores[begin:end].argsort(descending=True, stable=True)
        mask[begin + order[:kept]] = True
    return mask.nonzero()[:, 0]
