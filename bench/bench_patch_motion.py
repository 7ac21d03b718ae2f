"""patch_motion at real sizes. Predicted, not measured: 0.7 to 0.9 of an H100's copy bandwidth for 1080p frames."""

from __future__ import annotations

import torch

from vtok.bench.workload import VIDEOS, Workload

PATCH = [16, 16]


def workloads() -> list[Workload]:
    hd, square, _ = VIDEOS
    return [
        clip(hd, torch.uint8, "l1"),
        clip(square, torch.uint8, "l1"),
        clip(hd, torch.uint8, "l2"),
        clip(square, torch.float32, "l1"),
        clip(square, torch.bfloat16, "l2"),
        clip(square, torch.float32, "ssim"),
    ]


def clip(name: str, dtype: torch.dtype, metric: str) -> Workload:
    T, H, W = VIDEOS[name]
    shape = (1, T, 3, H, W)

    def make(device: torch.device) -> tuple:
        if dtype == torch.uint8:
            return torch.randint(0, 256, shape, device=device, dtype=dtype), PATCH
        return torch.randn(shape, device=device, dtype=dtype), PATCH

    moved = T * 3 * H * W * dtype.itemsize + 4 * T * -(-H // PATCH[0]) * -(-W // PATCH[1])
    text = {torch.uint8: "uint8", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return Workload(f"{name} {text}, {metric}", make, moved, roof="read", kwargs={"metric": metric, "pad": True})


def eager(frames: torch.Tensor, patch: list[int], *, metric: str, pad: bool) -> torch.Tensor:
    """As the published gates do: patches cut out, then compared in float32."""
    (ph, pw), (H, W) = patch, frames.shape[-2:]
    x = torch.nn.functional.pad(frames[0].float(), (0, -W % pw, 0, -H % ph))
    x = torch.nn.functional.unfold(x, (ph, pw), stride=(ph, pw)).transpose(1, 2)  # [T, N, P]
    now, before = x[1:], x[:-1]
    if metric == "l1":
        return (now - before).abs().mean(-1)
    if metric == "l2":
        return (now - before).norm(dim=-1)
    a, b = now - now.mean(-1, keepdim=True), before - before.mean(-1, keepdim=True)
    moments = a.square().mean(-1), b.square().mean(-1), (a * b).mean(-1)
    L = torch.maximum(now.amax(-1) - now.amin(-1), before.amax(-1) - before.amin(-1)).clamp(min=1)
    c1, c2, m = (0.01 * L) ** 2, (0.03 * L) ** 2, now.mean(-1) * before.mean(-1)
    squares = now.mean(-1) ** 2 + before.mean(-1) ** 2
    likeness = (2 * m + c1) * (2 * moments[2] + c2) / ((squares + c1) * (moments[0] + moments[1] + c2)).clamp(min=1e-12)
    return (1 - likeness).clamp(0, 2)
