"""run_curve at real sizes. It is bound by arithmetic, T²/2·D multiplications a site: 23 of the 46 GMAC that a full
256×196×3584 Gram matrix would take. Predicted, not measured, for an H100: a third of its float32 rate, 2 to 3 ms,
where 64-row tiles cover five eighths of each square and the dynamic programming adds a fifth."""

from __future__ import annotations

import torch

from vtok.bench.workload import CLIPS, Workload

BARS = {"cpu": {"vs_eager": 1.5}, "cuda": {"launches": 1}}


def workloads() -> list[Workload]:
    loads = [clip(name, *shape) for name, shape in CLIPS.items()]
    name, shape = next(iter(CLIPS.items()))
    return [*loads, clip(name, *shape, dtype=torch.float32)]


def clip(name: str, frames: int, sites: int, channels: int, *, dtype=torch.bfloat16) -> Workload:
    rows = frames * sites

    def make(device: torch.device) -> tuple:
        tokens = torch.randint(-2, 3, (rows, channels), device=device, dtype=dtype)  # sums are exact
        return tokens, torch.tensor([0, rows], device=device), torch.tensor([sites], device=device), frames

    moved = rows * (channels * dtype.itemsize + 8 + 8 * -(-frames // 64))
    return Workload(f"{name} {'bf16' if dtype == torch.bfloat16 else 'fp32'}", make, moved, roof=None)


def eager(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, tokens_per_frame: torch.Tensor, frames: int
) -> tuple[torch.Tensor, ...]:
    """A batched Gram matrix, its sums over runs, and all the last runs of a site at once."""
    x = tokens.unflatten(0, (frames, -1)).transpose(0, 1).float()
    x = x - x[:, :1]
    gram = torch.nn.functional.pad(x @ x.mT, (1, 0, 1, 0))
    both, own = gram.cumsum(1).cumsum(2), gram.diagonal(dim1=1, dim2=2).cumsum(1)
    square = both.diagonal(dim1=1, dim2=2)
    sums = square[:, None] + square[..., None] - both - both.mT
    length = torch.arange(frames + 1, device=x.device)
    cost = own[:, None] - own[..., None] - sums / (length - length[:, None]).clamp(min=1)
    cost = cost.clamp(min=0).masked_fill(length[:, None] >= length, torch.inf)  # of frames [i, j)
    least = torch.full_like(own, torch.inf)
    least[:, 0] = 0
    points, opens = [], []
    for _ in range(frames):
        least, at = (least[..., None] + cost).min(1)
        points.append(least[:, -1])
        opens.append(at)
    curve = torch.stack(points, 1)
    return curve, -curve.diff(dim=1), torch.stack(opens, 1)
