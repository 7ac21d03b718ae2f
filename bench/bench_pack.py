"""pack at real sizes: a quarter of the rows of a clip, in order."""

from __future__ import annotations

import torch

from vtok.bench.workload import CLIPS, MILLION, Workload

BARS = {"cuda": {"share": 0.85}}  # a gather is a gather: nobody's is slower


def workloads() -> list[Workload]:
    return [clip(name, *shape, gpu_only=name in MILLION) for name, shape in {**CLIPS, **MILLION}.items()]


def clip(name: str, frames: int, sites: int, channels: int, gpu_only: bool) -> Workload:
    rows = frames * sites
    kept = rows // 4

    def make(device: torch.device) -> tuple:
        tokens = torch.randn(rows, channels, device=device, dtype=torch.bfloat16)
        index = torch.randperm(rows, device=device)[:kept].sort().values
        return tokens, index

    moved = kept * channels * 2 * 2 + kept * 8
    return Workload(f"{name} bf16, 25 %", make, moved, roof="copy", gpu_only=gpu_only)


def eager(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tokens[index]
