"""topk at real sizes: a quarter of the scores, of one clip and of a ragged batch, with and without ties."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vtok.bench.workload import Workload

RAGGED = [16384 + 512 * (v % 17 - 8) for v in range(64)]  # 12k to 20k


def workloads() -> list[Workload]:
    return [
        segments("50k", [50176], torch.rand),
        segments("50k, all equal", [50176], equal),
        segments("1M", [1 << 20], torch.rand),
        segments("1M, all equal", [1 << 20], equal),
        segments("64 ragged of 16k", RAGGED, torch.rand),
        segments("64 ragged of 16k, all equal", RAGGED, equal),
        segments("256 frames of 196", [196] * 256, torch.rand),
    ]


def equal(rows: int, device: torch.device) -> torch.Tensor:
    return torch.full((rows,), 0.25, device=device)


def segments(name: str, lengths: list[int], scores: Callable[..., torch.Tensor]) -> Workload:
    rows, kept = sum(lengths), [n // 4 for n in lengths]

    def make(device: torch.device) -> tuple:
        cu_seqlens, cu_k = (torch.tensor([0, *sizes]).cumsum(0).to(device) for sizes in (lengths, kept))
        return scores(rows, device=device), cu_seqlens, cu_k, sum(kept)

    moved = 4 * rows + 8 * sum(kept) + 16 * (len(lengths) + 1)
    return Workload(f"{name} fp32, 25 %", make, moved, roof="read")


def eager(scores: torch.Tensor, cu_seqlens: torch.Tensor, cu_k: torch.Tensor, k: int) -> torch.Tensor:
    """The retention mask of the serving engines, video by video; every slot is filled."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for begin, end, kept in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), cu_k.diff().tolist(), strict=True):
        order = scores[begin:end].argsort(descending=True, stable=True)
        mask[begin + order[:kept]] = True
    return mask.nonzero()[:, 0]
