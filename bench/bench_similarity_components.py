"""similarity_components at real sizes: LLaVA-Scissor's first round, by frame, and its second, over a video's survivors.
Predicted, not measured, for an H100: half of its float32 rate, as for bipartite_match, whose tiles these are."""

from __future__ import annotations

import torch

from vtok.bench.workload import CLIPS, Workload


def workloads() -> list[Workload]:
    (t, n, D), (frames, sites, width), _ = CLIPS.values()
    return [
        groups(f"4×{n}×{D} bf16, by frame", [n] * 4, D),
        groups(f"{frames}×{sites}×{width} bf16, by frame", [sites] * frames, width, gpu_only=True),
        groups(f"4×{n}×{D} bf16, a clip", [4 * n], D),
        groups(f"{t}×{n}×{D} bf16, a clip", [t * n], D, gpu_only=True),
    ]


def groups(name: str, lengths: list[int], D: int, *, gpu_only: bool = False) -> Workload:
    rows = sum(lengths)

    def make(device: torch.device) -> tuple:
        scenes = torch.randint(-8, 9, (max(rows // 8, 1), D), device=device)  # sums are exact: every backend agrees
        x = scenes[torch.randint(0, len(scenes), (rows,), device=device)] + torch.randint(
            -2, 3, (rows, D), device=device
        )
        return x.to(torch.bfloat16), torch.tensor([0, *lengths]).cumsum(0).to(device), 0.9

    return Workload(name, make, rows * (2 * D + 8), roof=None, gpu_only=gpu_only)


def eager(rows: torch.Tensor, cu_seqlens: torch.Tensor, threshold: float) -> torch.Tensor:
    """For groups of one length: the matrix of similarities, then labels that flow along it until none changes."""
    x = torch.nn.functional.normalize(rows, dim=-1).unflatten(0, (cu_seqlens.shape[0] - 1, -1))
    linked = x @ x.transpose(-1, -2) > threshold
    label = torch.arange(rows.shape[0], device=rows.device).view(x.shape[:2])
    while True:
        flowed = torch.where(linked, label[:, None], rows.shape[0]).amin(-1).minimum(label)
        if torch.equal(flowed, label):
            return label.flatten()
        label = flowed
