"""What a bench_<op>.py declares.

* ``workloads() -> list[Workload]``: the sizes;
* ``eager(*args, **kwargs)``: the op as users write it today in eager PyTorch, the published implementations' way;
* where the file measures more than one op (a whole method): ``run(*args, **kwargs)``, and ``reference`` beside it.
  Without them they are the op itself and its reference. The reference is also what torch.compile is given.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Workload:
    """One size of an op.

    name: T×H×W×D or the like, with the dtype. make(device) -> the op's positional arguments; random data, never
    zeros. bytes: every input read once plus every output written once. roof: what the share is taken of, "read"
    (x.sum() on the same bytes) or "copy" (clone()); None for an op whose bar is a time. gpu_only: too large for a
    laptop. limit_us: the time bar on a GPU, over the bandwidth bound where there is a roof. exact: the outputs equal
    the reference's bit for bit (class E), else within the dtype's tolerance.
    """

    name: str
    make: Callable[[torch.device], tuple]
    bytes: int
    roof: str | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    gpu_only: bool = False
    limit_us: float | None = None
    exact: bool = True


# (frames, rows per frame, channels) of DESIGN.md section 5.
CLIPS = {"32×14×14×3584": (32, 196, 3584), "64×27×27×1152": (64, 729, 1152), "256×14×14×3584": (256, 196, 3584)}
MILLION = {"1M rows×3584": (5120, 196, 3584)}
# (frames, height, width) of what works on pixels.
VIDEOS = {"64×1072×1920": (64, 1072, 1920), "64×384×384": (64, 384, 384), "64×644×1148": (64, 644, 1148)}
# Rows of what works on one number a row.
ROWS = {"16k": 1 << 14, "50k": 50_176, "1M": 1_003_520}


@contextmanager
def tiny() -> Iterator[None]:
    """Every size shrunk to a few rows: to test the benchmarks themselves, and to time a call that does no work."""
    few: list[tuple[dict[str, Any], Any]] = [
        (CLIPS, (8, 4, 8)),
        (MILLION, (8, 4, 8)),
        (VIDEOS, (2, 112, 112)),
        (ROWS, 64),
    ]
    before = [dict(table) for table, _ in few]
    try:
        for table, size in few:
            table.update(dict.fromkeys(table, size))
        yield
    finally:
        for (table, _), sizes in zip(few, before, strict=True):
            table.update(sizes)


def modules() -> dict[str, ModuleType]:
    """The bench_<op>.py files by op, found and never listed."""
    names = sorted(i.name for i in pkgutil.iter_modules([str(Path(__file__).parent)]) if i.name.startswith("bench_"))
    return {name.removeprefix("bench_"): importlib.import_module(f"vtok.bench.{name}") for name in names}
