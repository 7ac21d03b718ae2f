"""What a bench_<op>.py declares: ``workloads() -> list[Workload]`` and ``eager(*args, **kwargs)``, the op as users
write it today in eager PyTorch (the published implementations' way; the reference is measured under torch.compile)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Workload:
    """One size of an op.

    name: T×H×W×D or the like, with the dtype. make(device) -> the op's positional arguments; random data, never
    zeros. bytes: every input read once plus every output written once. roof: what the share is taken of, "read"
    (x.sum() on the same bytes) or "copy" (clone()). gpu_only: too large for a laptop.
    """

    name: str
    make: Callable[[torch.device], tuple]
    bytes: int
    roof: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    gpu_only: bool = False


# (frames, rows per frame, channels) of DESIGN.md section 5.
CLIPS = {"32×14×14×3584": (32, 196, 3584), "64×27×27×1152": (64, 729, 1152), "256×14×14×3584": (256, 196, 3584)}
MILLION = {"1M rows×3584": (5120, 196, 3584)}
