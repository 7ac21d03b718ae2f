"""temporal_gate at real sizes: scenes of eight frames, so that most rows join. Predicted, not measured: 0.6 to 0.9 of
an H100's copy bandwidth at 1M rows, where 196 sites are all there is to keep the GPU busy with."""

from __future__ import annotations

import torch

from vtok.bench.workload import CLIPS, MILLION, Workload


def workloads() -> list[Workload]:
    loads = [clip(name, *shape, gpu_only=name in MILLION) for name, shape in {**CLIPS, **MILLION}.items()]
    name, shape = next(iter(CLIPS.items()))
    return [
        *loads,
        clip(name, *shape, reference="previous"),
        clip(name, *shape, reference="run_mean"),
        clip(name, *shape, dtype=torch.float32),
    ]


def clip(
    name: str, frames: int, sites: int, channels: int, *, reference="last_kept", dtype=torch.bfloat16, gpu_only=False
) -> Workload:
    rows = frames * sites

    def make(device: torch.device) -> tuple:
        scenes = torch.randn((frames + 7) // 8, 1, sites, channels, device=device, dtype=dtype)
        tokens = scenes.expand(-1, 8, -1, -1).flatten(0, 1)[:frames].flatten(0, 1)
        tokens = tokens + torch.randn(rows, channels, device=device, dtype=dtype) / 2
        return tokens, torch.tensor([0, rows], device=device), torch.tensor([sites], device=device), sites, 0.7

    moved = rows * channels * dtype.itemsize + rows * 5 + sites * channels * 4
    text = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return Workload(
        f"{name} {text} {reference}", make, moved, roof="read", kwargs={"reference": reference}, gpu_only=gpu_only
    )


def eager(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, tokens_per_frame: torch.Tensor, sites: int, threshold: float, *,
    reference: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """A loop over the frames."""
    frames = tokens.unflatten(0, (-1, sites))
    run, weight = frames[0].float(), tokens.new_ones(sites, dtype=torch.float32)
    keep, similarity = [weight > 0], [weight - torch.inf]
    for frame in frames[1:]:
        mean = run / weight[:, None] if reference == "run_mean" else run
        score = torch.nn.functional.cosine_similarity(frame.float(), mean, dim=-1)
        joins = score > threshold
        joined = {"previous": frame, "last_kept": run, "run_mean": run + frame}[reference]
        run = torch.where(joins[:, None], joined, frame).float()
        weight = torch.where(joins, weight + 1, 1)
        keep.append(~joins)
        similarity.append(score)
    return torch.cat(keep), torch.cat(similarity), run, weight, torch.tensor([len(frames)])
