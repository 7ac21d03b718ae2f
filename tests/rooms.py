"""What the test rooms share. tests/ops/test_<op>.py says what its op does with

* ``cases() -> list[Case]``: small inputs, awkward ones included; the contract tests run every backend over them;
* ``errors() -> list[Error]``: bad calls with the sentence each raises;
* ``host(kernels, *args, **kwargs)``: the op through the host build of its CUDA kernels (NumPy arrays in and out);
* optional ``compare(got, case)``: how outputs are judged; without it they equal the reference's, bit for bit;
* optional ``grad_cases() -> list[Case]``: float64 inputs for gradcheck, required where the op is differentiable.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vtok
from vtok.ops._rooms import ROOMS

ROOT = Path(__file__).resolve().parent.parent
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    name: str
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Error:
    message: str
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    only_cpu: bool = False  # needs the values, which other devices never look at


def test_rooms() -> dict[str, ModuleType]:
    folder = Path(__file__).with_name("ops")
    names = [info.name for info in pkgutil.iter_modules([str(folder)]) if info.name.startswith("test_")]
    return {name.removeprefix("test_"): importlib.import_module(f"ops.{name}") for name in names}


TEST_ROOMS: dict[str, ModuleType] = {}


def all_cases() -> list[tuple[str, Case]]:
    if not TEST_ROOMS:
        TEST_ROOMS.update(test_rooms())
    return [(op, case) for op, room in TEST_ROOMS.items() for case in room.cases()]


def generator(*seed: Any) -> torch.Generator:
    """A generator seeded by whatever names the case, the same in every process."""
    return torch.Generator().manual_seed(int.from_bytes(repr(seed).encode(), "little") % (2**63 - 25))


def randn(shape: tuple[int, ...], dtype: torch.dtype, *seed: Any) -> Tensor:
    return torch.randn(shape, generator=generator(shape, *seed), dtype=torch.float32).to(dtype)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and values; NaN equals NaN, and -0 is not +0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        nan = a.isnan() & b.isnan()
        zero = torch.zeros((), dtype=a.dtype)
        return bool(((a == b) & (torch.signbit(a) == torch.signbit(b)) | nan).all()) and zero.dtype == b.dtype
    return torch.equal(a, b)


def check(op: str, got: Any, case: Case) -> None:
    """Judge what a backend returned for a case."""
    room = TEST_ROOMS[op]
    if hasattr(room, "compare"):
        room.compare(outputs(got), case)
        return
    want = outputs(ROOMS[op].reference(*case.args, **case.kwargs))
    assert len(outputs(got)) == len(want)
    for i, (a, b) in enumerate(zip(outputs(got), want, strict=True)):
        assert same_bits(a, b), f"output {i} of {op}[{case}]:\n{a}\nexpected\n{b}"


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Contiguous NumPy storage of a tensor; bf16 and f16 as their bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def from_numpy(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if dtype is None or tensor.dtype == dtype else tensor.view(dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """Output storage that no kernel would write by chance."""
    itemsize = torch.empty((), dtype=dtype).element_size()
    raw = np.full(int(np.prod(shape)) * itemsize, 0xA5, dtype=np.uint8)
    return raw.view(
        {
            1: np.uint8,
            2: np.int16,
            4: np.float32 if dtype == torch.float32 else np.int32,
            8: np.float64 if dtype == torch.float64 else np.int64,
        }[itemsize]
    ).reshape(shape)


def strided(tensor: Tensor) -> Tensor:
    """The same values, laid out so that neither rows nor columns are dense."""
    if tensor.dim() == 0:
        return tensor
    return torch.stack([tensor, torch.full_like(tensor, 1)], -1)[..., 0]


def row_slice(tensor: Tensor) -> Tensor:
    """The same values as columns of a wider buffer: dense rows, free row stride."""
    if tensor.dim() != 2:
        return tensor
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 5), 1)
    wide[:, 2 : 2 + tensor.shape[1]] = tensor
    return wide[:, 2 : 2 + tensor.shape[1]]


def op_of(name: str):
    return getattr(vtok.ops, name)
