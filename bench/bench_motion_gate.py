"""motion_gate at real sizes: half of the patches move at every step. Predicted, not measured: 0.6 to 0.8 of an H100's
copy bandwidth for 1080p frames, the references coming from the L2 cache."""

from __future__ import annotations

import torch

from vtok.bench.workload import VIDEOS, Workload

PATCH = [16, 16]
BARS = {"cpu": {"vs_compile": 1.5, "vs_eager": 10}}  # it writes a reference too: no share of a read is owed


def workloads() -> list[Workload]:
    hd, square, _ = VIDEOS
    return [
        clip(hd, torch.uint8, 85.3),
        clip(square, torch.uint8, 85.3),
        clip(square, torch.float32, 1.128),
        clip(square, torch.bfloat16, 1.128),
    ]


def clip(name: str, dtype: torch.dtype, threshold: float) -> Workload:
    T, H, W = VIDEOS[name]
    shape = (1, T, 3, H, W)

    def make(device: torch.device) -> tuple:
        if dtype == torch.uint8:
            return torch.randint(0, 256, shape, device=device, dtype=dtype), PATCH, threshold
        return torch.randn(shape, device=device, dtype=dtype), PATCH, threshold

    moved = (T + 1) * 3 * H * W * dtype.itemsize + 5 * T * -(-H // PATCH[0]) * -(-W // PATCH[1]) + 8
    text = {torch.uint8: "uint8", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return Workload(f"{name} {text}, l1", make, moved, roof="read", kwargs={"pad": True})


def eager(frames: torch.Tensor, patch: list[int], threshold: float, *, pad: bool) -> tuple[torch.Tensor, ...]:
    """As the published gates do: patches cut out, then compared and overwritten frame by frame."""
    (ph, pw), (H, W) = patch, frames.shape[-2:]
    x = torch.nn.functional.pad(frames[0].float(), (0, -W % pw, 0, -H % ph))
    x = torch.nn.functional.unfold(x, (ph, pw), stride=(ph, pw)).transpose(1, 2)  # [T, N, P]
    kept = x[0].clone()
    keeps, scores = [torch.ones_like(x[0, :, 0], dtype=torch.bool)], [torch.full_like(x[0, :, 0], torch.inf)]
    for now in x[1:]:
        scores.append((now - kept).abs().mean(-1))
        keeps.append(scores[-1] > threshold)
        if keeps[-1].any():
            kept[keeps[-1]] = now[keeps[-1]]
    return torch.stack(keeps), torch.stack(scores), kept, torch.tensor([len(x)])
