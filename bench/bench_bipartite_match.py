"""bipartite_match at real sizes. Predicted, not measured, for an H100: half of its float32 rate, so 60 µs for the
1.26 GFLOP of a clip of keys, where eager's matrix of similarities alone is 39 MB; bfloat16 rows as wide as a
language model's are faster by eager's tensor cores, in bfloat16."""

from __future__ import annotations

import torch

from vtok.bench.workload import CLIPS, Workload

KEYS = 64  # channels of ToMe's metric, attention keys averaged over the heads


def workloads() -> list[Workload]:
    (t, n, D), (frames, _, width), _ = CLIPS.values()
    return [
        segments(f"{t}×{n}×{KEYS} fp32, a clip", [t * n], KEYS),
        segments(f"{t}×{n}×{KEYS} bf16, a clip", [t * n], KEYS, torch.bfloat16),
        segments(f"{frames}×{n}×{width} bf16, by frame", [n] * frames, width, torch.bfloat16),
        segments(f"4×{n}×{D} bf16, a clip", [4 * n], D, torch.bfloat16),
        segments(f"{t}×{n}×{D} bf16, a clip", [t * n], D, torch.bfloat16, gpu_only=True),
    ]


def segments(name: str, lengths: list[int], D: int, dtype=torch.float32, *, gpu_only: bool = False) -> Workload:
    rows = sum(lengths)

    def make(device: torch.device) -> tuple:
        keys = torch.randint(-8, 9, (rows, D), device=device, dtype=dtype)  # sums are exact: every backend agrees
        return keys, torch.tensor([0, *lengths]).cumsum(0).to(device)

    moved = rows * (D * dtype.itemsize + 12)
    return Workload(name, make, moved, roof=None, gpu_only=gpu_only)


def eager(rows: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ToMe's own way, for segments of one length: the matrix of similarities, then its maxima."""
    x = rows.unflatten(0, (cu_seqlens.shape[0] - 1, -1))
    x = x / x.norm(dim=-1, keepdim=True)
    best, at = (x[:, ::2] @ x[:, 1::2].transpose(-1, -2)).max(-1)
    return best, at
