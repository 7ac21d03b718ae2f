"""One clip through one method: patches or an encoder's tokens in, rows out, timed, and the clip rebuilt."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vtok

if TYPE_CHECKING:
    from vtok.packed import Packed

BASELINES = {"uniform": "uniform frames", "random": "random rows"}
Amount = dict[str, Any]  # keywords of compress and gate_patches: budget or threshold, and options of the method
REPEATS, ENOUGH = 15, 1.0  # a step is timed that often, or for that many seconds


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    moved: int | None = None  # bytes, where they are what the time goes into

    def __str__(self) -> str:
        rate = "" if self.moved is None else f", {self.moved / self.seconds / 1e9:.2g} GB/s"
        return f"{self.seconds * 1e3:.2f} ms{rate}"


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


def run(
    frames: Tensor,
    patch: int,
    amount: Amount,
    method: str,
    device: torch.device,
    *,
    tokens: Tensor | None = None,
    tubelet: int = 1,
) -> Trial:
    """Compress the patches of uint8 frames (T, H, W, 3) to a budget of rows or a share, or by a threshold.

    A method of the kind "gate" looks at the pixels themselves, which count from -1 to 1.
    With ``tokens`` (1, T/tubelet, h, w, D) of an encoder it is these that are compressed; the clip is then rebuilt from
    the pixels at the sites of the kept ones. A last tubelet that is not whole repeats the last frame.
    """
    frames = frames.to(device)
    pixels = patchify(frames, patch, tubelet)  # the first calls, which load what is lazy, are not timed
    gates = vtok.methods.get(method).kind == "gate"
    if gates and tokens is not None:
        raise ValueError(f"expected a method for tokens with an encoder, got {method!r}, which gates pixels before it")
    tokens = pixels if tokens is None else tokens.to(device)
    seen = normalised(frames) if gates else tokens

    def work() -> Packed:
        if gates:
            return vtok.gate_patches(seen, patch=patch, method=method, **amount)
        return vtok.compress(tokens, method=method, **amount)

    with _Ops() as ops:
        packed = work()
    named = "score, select, patchify" if gates else "score, select, pack"
    steps = [Step(named, _median(work, device), seen.nbytes + 2 * packed.values.nbytes)]
    packed = packed.trim()
    if tokens is pixels and not gates:
        cutting = _median(lambda: patchify(frames, patch), device)
        steps.insert(0, Step("patchify", cutting, frames.nbytes + pixels.nbytes))

    def rebuild(packed: Packed) -> Tensor:
        if packed.vectors is not None:
            return levels(vtok.rebuild_patches(packed, patch=patch))
        values = packed.values if tokens is pixels else packed.reduce(pixels.flatten(0, -2))
        return unpatchify(packed, values, frames.shape, patch, tubelet)

    rebuilt = rebuild(packed)
    quality = {method: psnr(frames, rebuilt)}
    for baseline, name in BASELINES.items() if packed.index.shape[0] else ():
        if baseline != method:
            other = vtok.compress(tokens, budget=packed.values.shape[0], method=baseline)
            quality[name] = psnr(frames, rebuild(other))
    return Trial(packed, steps, {op: vtok.backend_of(op, device) for op in ops.seen}, rebuilt.cpu(), quality)


def normalised(frames: Tensor) -> Tensor:
    """uint8 (T, H, W, 3) to float32 (1, T, 3, H, W) in [-1, 1]."""
    return frames.permute(0, 3, 1, 2)[None].to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def whole_tubelets(frames: Tensor, tubelet: int) -> Tensor:
    """The frames, the last one repeated until they are a multiple of ``tubelet``."""
    return torch.cat([frames, frames[-1:].expand(-len(frames) % tubelet, -1, -1, -1)])


def patchify(frames: Tensor, patch: int, tubelet: int = 1) -> Tensor:
    """uint8 (T, H, W, 3) to float32 (1, T/t, h, w, t·3·p·p) in [-1, 1]."""
    frames = whole_tubelets(frames, tubelet)
    count, height, width, channels = frames.shape
    cut = frames.view(count // tubelet, tubelet, height // patch, patch, width // patch, patch, channels)
    floats = cut.permute(0, 2, 4, 1, 6, 3, 5).to(torch.float32, memory_format=torch.contiguous_format)
    return floats.flatten(3)[None].div_(127.5).sub_(1)


def unpatchify(packed: Packed, values: Tensor, shape: tuple[int, ...], patch: int, tubelet: int = 1) -> Tensor:
    """The clip, uint8 (T, H, W, 3), as the pixels ``values`` of its kept rows tell it."""
    return pixels_of(packed.unmerge(values.float(), fill="hold"), shape, patch, tubelet)


def pixels_of(tokens: Tensor, shape: tuple[int, ...], patch: int, tubelet: int = 1) -> Tensor:
    """uint8 (T, H, W, 3) of the patches of all sites in [-1, 1]."""
    count, height, width, channels = shape
    cut = _bytes(tokens).view(-1, height // patch, width // patch, tubelet, channels, patch, patch)
    return cut.permute(0, 3, 1, 5, 2, 6, 4).reshape(-1, height, width, channels)[:count]


def levels(frames: Tensor) -> Tensor:
    """uint8 (T, H, W, 3) of (1, T, 3, H, W) in [-1, 1]."""
    return _bytes(frames[0]).permute(0, 2, 3, 1)


def _bytes(values: Tensor) -> Tensor:
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


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


def psnr(a: Tensor, b: Tensor) -> float:
    """dB, of two uint8 clips."""
    error = sum((x.float() - y.float()).square().sum(dtype=torch.float64).item() for x, y in zip(a, b, strict=True))
    return 10 * math.log10(255**2 * a.numel() / error) if error else math.inf


class _Ops(TorchDispatchMode):
    """Notes which ops of ours run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "vtok" and name in vtok.ops.__all__:  # what has kernels
            self.seen[name] = None
        return func(*args, **(kwargs or {}))
