"""patchify at real sizes: a quarter of the patches of a clip, in order, normalised for the tower that takes them."""

from __future__ import annotations

import torch

from vtok.bench.workload import VIDEOS, Workload

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def workloads() -> list[Workload]:
    hd, square, native = VIDEOS
    return [
        clip(hd, 16, 1, torch.uint8, torch.bfloat16),
        clip(square, 16, 1, torch.float32, torch.float32),
        clip(native, 14, 2, torch.uint8, torch.bfloat16),
    ]


def clip(name: str, patch: int, tubelet: int, source: torch.dtype, dtype: torch.dtype) -> Workload:
    T, H, W = VIDEOS[name]
    sites = T // tubelet * (H // patch) * (W // patch)
    kept, values = sites // 4, 3 * tubelet * patch * patch

    def make(device: torch.device) -> tuple:
        if source == torch.uint8:
            frames = torch.randint(0, 256, (1, T, 3, H, W), dtype=source, device=device)
        else:
            frames = torch.randn(1, T, 3, H, W, dtype=source, device=device)
        index = torch.randperm(sites, device=device)[:kept].sort().values
        return frames, index, [patch, patch], tubelet

    moved = kept * values * (source.itemsize + dtype.itemsize) + kept * 8
    names = f"{str(source)[6:]} to {str(dtype)[6:]}"
    kwargs = {"mean": MEAN, "std": STD, "dtype": dtype}
    return Workload(f"{name} patch {tubelet}×{patch}, {names}, 25 %", make, moved, roof="copy", kwargs=kwargs)


def eager(
    frames: torch.Tensor, index: torch.Tensor, patch: list[int], tubelet: int, *, mean, std, dtype
) -> torch.Tensor:
    """Every frame normalised, cast and cut up before the patches are chosen."""
    x = frames / 255 if frames.dtype == torch.uint8 else frames
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (mean, std))
    x = ((x - mean) / std).to(dtype)
    x = x.unflatten(4, (-1, patch[1])).unflatten(3, (-1, patch[0])).unflatten(1, (-1, tubelet))
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(0, 3)[index]
