"""One clip through one method: patches in, rows out, timed, and the clip rebuilt from the rows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vtok

if TYPE_CHECKING:
    from vtok.packed import Packed

BASELINES = {"uniform": "uniform frames", "random": "random rows"}
REPEATS, ENOUGH = 15, 1.0  # a step is timed that often, or for that many seconds


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    moved: int  # bytes

    def __str__(self) -> str:
        return f"{self.seconds * 1e3:.2f} ms, {self.moved / self.seconds / 1e9:.2g} GB/s"


@dataclass(frozen=True)
class Trial:
    packed: Packed
    steps: list[Step]
    backends: dict[str, str]  # of the ops that ran
    rebuilt: Tensor  # uint8 (T, H, W, 3)
    psnr: dict[str, float]  # dB, of the clip rebuilt by the method and, from as many rows, by the baselines

    @property
    def rows(self) -> int:
        return self.packed.values.shape[0]

    @property
    def tokens(self) -> int:
        return self.packed.mask.numel()


def run(frames: Tensor, patch: int, budget: int | Fraction, method: str, device: torch.device) -> Trial:
    """Compress the patches of uint8 frames (T, H, W, 3) to a budget of rows or a share."""
    frames = frames.to(device)
    tokens = patchify(frames, patch)  # the first calls, which load what is lazy, are not timed
    with _Ops() as ops:
        packed = vtok.compress(tokens, budget=budget, method=method)
    cutting = _median(lambda: patchify(frames, patch), device)
    packing = _median(lambda: vtok.compress(tokens, budget=budget, method=method), device)
    steps = [
        Step("patchify", cutting, frames.nbytes + tokens.nbytes),
        Step("score, select, pack", packing, tokens.nbytes + 2 * packed.values.nbytes),
    ]
    rebuilt = unpatchify(packed, frames.shape, patch)
    psnr = {method: _psnr(frames, rebuilt)}
    for baseline, name in BASELINES.items():
        if baseline != method:
            other = vtok.compress(tokens, budget=packed.values.shape[0], method=baseline)
            psnr[name] = _psnr(frames, unpatchify(other, frames.shape, patch))
    return Trial(packed, steps, {op: vtok.backend_of(op, device) for op in ops.seen}, rebuilt.cpu(), psnr)


def patchify(frames: Tensor, patch: int) -> Tensor:
    """uint8 (T, H, W, 3) to float32 (1, T, h, w, 3·p·p) in [-1, 1]."""
    count, height, width, channels = frames.shape
    cut = frames.view(count, height // patch, patch, width // patch, patch, channels)
    floats = cut.permute(0, 1, 3, 5, 2, 4).to(torch.float32, memory_format=torch.contiguous_format)
    return floats.flatten(3)[None].div_(127.5).sub_(1)


def unpatchify(packed: Packed, shape: tuple[int, ...], patch: int) -> Tensor:
    """The clip, uint8 (T, H, W, 3), as its kept rows tell it."""
    count, height, width, channels = shape
    values = ((packed.values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    tokens = packed.unmerge(values, fill="hold")
    cut = tokens.view(count, height // patch, width // patch, channels, patch, patch)
    return cut.permute(0, 1, 4, 2, 5, 3).reshape(shape)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    start = time.perf_counter()
    value = work()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return value, time.perf_counter() - start


def _median(work: Callable[[], Any], device: torch.device) -> float:
    taken = [timed(work, device)[1]]
    while len(taken) < REPEATS and sum(taken) < ENOUGH:
        taken.append(timed(work, device)[1])
    return statistics.median(taken)


def _psnr(a: Tensor, b: Tensor) -> float:
    error = sum((x.float() - y.float()).square().sum(dtype=torch.float64).item() for x, y in zip(a, b, strict=True))
    return 10 * math.log10(255**2 * a.numel() / error) if error else math.inf


class _Ops(TorchDispatchMode):
    """Notes which ops of ours run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vtok":
            self.seen[func.overloadpacket.__name__] = None
        return func(*args, **(kwargs or {}))
