"""density_cluster at real sizes: a tenth of each frame's rows become centres. Predicted, not measured, for an H100: a
third of its float32 rate, two instructions for a difference and its square, so 0.8 ms for 32 frames of 196×3584, all
pairs once and half of them again; eager's matrix product of 9 GFLOP in float32 takes about 0.2 ms and what follows it
a dozen passes over the distances."""

from __future__ import annotations

import torch

from vtok.bench.workload import CLIPS, Workload

BARS = {"cuda": {"launches": 5}}
KEYS = 64  # channels of attention keys averaged over the heads


def workloads() -> list[Workload]:
    (t, n, D), (frames, sites, width), (long, _, _) = CLIPS.values()
    return [
        groups(f"{t}×{n}×{KEYS} fp32, by frame", [n] * t, KEYS),
        groups(f"{t // 4}×{n}×{D} bf16, by frame", [n] * (t // 4), D, torch.bfloat16),
        groups(f"2×{sites}×{width} bf16, by frame", [sites] * 2, width, torch.bfloat16),
        groups(f"{4 * n}×{KEYS} fp32, a window", [4 * n], KEYS),
        groups(f"{t}×{n}×{D} bf16, by frame", [n] * t, D, torch.bfloat16, gpu_only=True),
        groups(f"{frames}×{sites}×{width} bf16, by frame", [sites] * frames, width, torch.bfloat16, gpu_only=True),
        groups(f"{long}×{n}×{D} bf16, by frame", [n] * long, D, torch.bfloat16, gpu_only=True),
    ]


def groups(name: str, lengths: list[int], D: int, dtype=torch.float32, *, gpu_only: bool = False) -> Workload:
    rows, centres = sum(lengths), [(n + 9) // 10 for n in lengths]

    def make(device: torch.device) -> tuple:
        x = torch.randint(-8, 9, (rows, D), device=device, dtype=dtype)  # sums are exact: every backend agrees
        cu_seqlens, cu_k = (torch.tensor([0, *sizes]).cumsum(0).to(device) for sizes in (lengths, centres))
        return x, cu_seqlens, cu_k, sum(centres)

    moved = rows * (D * dtype.itemsize + 12) + 8 * sum(centres)
    return Workload(f"{name}, 10 %", make, moved, roof=None, gpu_only=gpu_only)


def eager(rows: torch.Tensor, cu_seqlens: torch.Tensor, cu_k: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """The published way, for groups of one length: the matrix of distances, without the noise on the density."""
    x = rows.float().unflatten(0, (cu_seqlens.shape[0] - 1, -1))
    d = torch.cdist(x, x) / x.shape[-1] ** 0.5
    density = d.topk(min(7, d.shape[-1]), largest=False).values.square().mean(-1).neg().exp()
    farther = torch.where(density[:, None] > density[:, :, None], d, d.amax((1, 2), keepdim=True))
    score = farther.amin(-1) * density
    centres = score.topk(k // x.shape[0]).indices
    to = d.gather(2, centres[:, None].expand(-1, x.shape[1], -1))
    return to.argmin(-1).flatten(), centres.flatten(), score.flatten()
