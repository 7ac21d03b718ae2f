"""merge at real sizes: every site averaged over runs of 1 to 8 frames, a quarter of the rows left."""

from __future__ import annotations

import torch

from vtok.bench.workload import CLIPS, MILLION, Workload

LONGEST = 8


def workloads() -> list[Workload]:
    return [clip(name, *shape, gpu_only=name in MILLION) for name, shape in {**CLIPS, **MILLION}.items()]


def runs(frames: int, sites: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Each site's frames, cut in two at a random place in every eight; groups in the order of their first rows."""
    first = torch.randint(1, LONGEST + 1, (frames // LONGEST, sites), device=device)
    head = torch.arange(frames * sites, device=device).view(-1, LONGEST, sites)[:, 0]
    heads, lengths = torch.cat([head, head + first * sites]).flatten(), torch.cat([first, LONGEST - first]).flatten()
    order = heads.argsort(stable=True)
    heads, lengths = heads[order], lengths[order]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    of = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=frames * sites)
    frame = torch.arange(frames * sites, device=device) - offsets[of]
    return heads[of] + frame * sites, offsets


def clip(name: str, frames: int, sites: int, channels: int, gpu_only: bool) -> Workload:
    rows = frames * sites
    groups = rows // 4

    def make(device: torch.device) -> tuple:
        return torch.randn(rows, channels, device=device, dtype=torch.bfloat16), *runs(frames, sites, device)

    moved = (rows + groups) * channels * 2 + (rows + groups) * 8 + groups * 4
    return Workload(f"{name} bf16, mean of runs", make, moved, roof="copy", gpu_only=gpu_only)


def eager(tokens: torch.Tensor, members: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    group = torch.arange(offsets.shape[0] - 1, device=tokens.device).repeat_interleave(offsets.diff())
    sums = torch.zeros(offsets.shape[0] - 1, tokens.shape[1], device=tokens.device)
    sums.index_add_(0, group, tokens[members].float())
    weight = offsets.diff().float()
    return (sums / weight.clamp(min=1)[:, None]).to(tokens.dtype), weight
