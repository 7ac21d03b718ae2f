"""motion_search at the sizes that a full search is done at: a few frames of pixels, (2·radius + 1)² distances a patch.
Bound by arithmetic, so that no share of a read is owed."""

from __future__ import annotations

import torch

from vtok.bench.workload import VIDEOS, Workload

PATCH, FRAMES = [16, 16], 4
BARS = {"cpu": {"vs_compile": 1.5, "vs_eager": 10}, "cuda": {"vs_compile": 1.2, "vs_eager": 3}}


def workloads() -> list[Workload]:
    _, square, _ = VIDEOS
    return [
        clip(square, torch.uint8, "l1", 4),
        clip(square, torch.uint8, "l1", 2),
        clip(square, torch.float32, "l2", 2),
    ]


def clip(name: str, dtype: torch.dtype, metric: str, radius: int) -> Workload:
    _, H, W = VIDEOS[name]
    shape = (1, FRAMES, 3, H, W)

    def make(device: torch.device) -> tuple:
        if dtype == torch.uint8:
            return torch.randint(0, 256, shape, device=device, dtype=dtype), PATCH, radius
        return torch.randn(shape, device=device, dtype=dtype), PATCH, radius

    moved = FRAMES * 3 * H * W * dtype.itemsize + 20 * FRAMES * -(-H // PATCH[0]) * -(-W // PATCH[1])
    text = {torch.uint8: "uint8", torch.float32: "fp32"}[dtype]
    kwargs = {"metric": metric, "pad": True}
    return Workload(f"{FRAMES}×{H}×{W} {text}, {metric}, radius {radius}", make, moved, roof="read", kwargs=kwargs)


def eager(frames: torch.Tensor, patch: list[int], radius: int, *, metric: str, pad: bool) -> tuple[torch.Tensor, ...]:
    """As block matching is written in PyTorch: patches cut out of the frames and of the moved frames before."""
    (ph, pw), (H, W) = patch, frames.shape[-2:]

    def cut(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(x, (0, -W % pw, 0, -H % ph))
        return torch.nn.functional.unfold(x, (ph, pw), stride=(ph, pw))  # [T, P, N]

    x = frames[0].float()
    now, before = cut(x[1:]), torch.nn.functional.pad(x[:-1], (radius,) * 4, value=torch.inf)
    reach = range(-radius, radius + 1)
    vectors = sorted(((dy, dx) for dy in reach for dx in reach), key=lambda v: (abs(v[0]) + abs(v[1]), v))
    costs = []
    for dy, dx in vectors:
        there = cut(before[:, :, radius + dy : radius + dy + H, radius + dx : radius + dx + W])
        costs.append((now - there).abs().mean(1) if metric == "l1" else (now - there).norm(dim=1))
    motion, best = torch.stack(costs).min(0)
    return motion, torch.tensor(vectors, device=x.device)[best]
