"""temporal_similarity at real sizes. Predicted, not measured: 0.85 to 0.95 of an H100's copy bandwidth at 1M rows."""

from __future__ import annotations

import torch

from vtok.bench.workload import CLIPS, MILLION, Workload


def workloads() -> list[Workload]:
    loads = [clip(name, *shape, gpu_only=name in MILLION) for name, shape in {**CLIPS, **MILLION}.items()]
    name, shape = next(iter(CLIPS.items()))
    return [*loads, clip(name, *shape, dtype=torch.float32)]


def clip(
    name: str, frames: int, sites: int, channels: int, *, dtype=torch.bfloat16, gpu_only: bool = False
) -> Workload:
    rows = frames * sites

    def make(device: torch.device) -> tuple:
        tokens = torch.randn(rows, channels, device=device, dtype=dtype)
        return tokens, torch.tensor([0, rows], device=device), torch.tensor([sites], device=device)

    moved = rows * channels * dtype.itemsize + rows * 4
    text = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return Workload(f"{name} {text}", make, moved, roof="read", gpu_only=gpu_only)


def eager(tokens: torch.Tensor, cu_seqlens: torch.Tensor, tokens_per_frame: torch.Tensor) -> torch.Tensor:
    frames = tokens.unflatten(0, (-1, int(tokens_per_frame)))
    return torch.nn.functional.cosine_similarity(frames[1:], frames[:-1], dim=-1)
