"""A whole compression: EVS at a quarter of the rows, with index, positions and scores, beside the engines' own path."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

import vtok
from vtok.bench.workload import CLIPS, MILLION, Workload
from vtok.ops._rooms import ROOMS

# A million rows may take 15 % over the bandwidth bound, a clip 25 µs.
BARS = {"cpu": {"vs_eager": 10}, "cuda": {"share": 1 / 1.15}}
CLIP_US = 25

Grid = tuple[int, int, int]


def workloads() -> list[Workload]:
    return [clip(name, *shape, gpu_only=name in MILLION) for name, shape in {**CLIPS, **MILLION}.items()]


def clip(name: str, frames: int, sites: int, channels: int, gpu_only: bool) -> Workload:
    rows, side = frames * sites, math.isqrt(sites)

    def make(device: torch.device) -> tuple:
        tokens = torch.randn(rows, channels, device=device, dtype=torch.bfloat16)
        return tokens, (frames, side, side)

    kept = rows // 4
    moved = (rows + kept) * channels * 2 + kept * 32
    return Workload(
        f"{name} bf16, evs 25 %", make, moved, roof="read", gpu_only=gpu_only, limit_us=None if gpu_only else CLIP_US
    )


@cache
def prepared(grid: Grid, device: torch.device) -> tuple[vtok.Layout, vtok.Plan]:
    """What a server makes once for a shape, outside the graph."""
    layout = vtok.Layout.from_grid([grid], device=device)
    return layout, vtok.Plan.of(layout, budget="25%")


def run(tokens: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    layout, plan = prepared(grid, tokens.device)
    packed = vtok.compress(tokens, layout, budget=plan, method="evs")
    assert packed.scores is not None
    return packed.values, packed.index, packed.positions, packed.scores


def reference(tokens: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    _, h, w = grid
    rows = tokens.shape[0]
    cu_seqlens = torch.arange(2, device=tokens.device) * rows
    sites = torch.full((1,), h * w, device=tokens.device)
    score = 1 - ROOMS["temporal_similarity"].reference(tokens, cu_seqlens, sites)
    index = ROOMS["topk"].reference(score, cu_seqlens, torch.arange(2, device=tokens.device) * (rows // 4), rows // 4)
    positions = torch.stack([index // (h * w), index // w % h, index % w], -1)
    return ROOMS["pack"].reference(tokens, index), index, positions, score


def eager(tokens: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """The engines' rule, step by step as they do: cosine in the tokens' dtype, frame 0 at 255, stable sort, mask."""
    frames, h, w = grid
    x = tokens.view(frames, h * w, -1)
    change = 1 - torch.nn.functional.cosine_similarity(x[1:], x[:-1], dim=-1)
    score = torch.cat([torch.full_like(change[:1], 255), change]).flatten()
    kept = torch.argsort(score, descending=True, stable=True)[: score.shape[0] // 4]
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[kept] = True
    return tokens[mask], mask.nonzero().flatten(), mask.view(grid).nonzero(), score
