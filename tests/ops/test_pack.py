"""pack: what only it promises. The contract tests run over cases() by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vtok
from vtok import _load

from rooms import FLOATS, Case, Error, from_numpy, poisoned, randn, to_numpy


def index(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def cases() -> list[Case]:
    shapes = [(1, 1), (5, 77), (9, 256), (33, 64)]
    made = [
        Case(f"{s}x{d}-{str(dtype)[6:]}", (randn((s, d), dtype), torch.randint(-1, s, (2 * s + 1,))))
        for s, d in shapes
        for dtype in FLOATS
    ]
    return [
        *made,
        Case("no-index", (randn((4, 8), torch.float32), index([]))),
        Case("no-rows", (torch.empty(0, 8), index([-1, -1]))),
        Case("no-columns", (torch.empty(3, 0), index([0, 2]))),
        Case("nan", (torch.tensor([[float("nan"), -0.0], [1.0, 2.0]]), index([0, -1, 0, 1]))),
        Case("uint8", (torch.arange(35, dtype=torch.uint8).view(5, 7), index([4, 0, -1]))),
        Case("int64", (torch.arange(15).view(5, 3) << 40, index([4, -1, 0]))),
    ]


def grad_cases() -> list[Case]:
    tokens = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    return [Case("repeats", (tokens, index([4, -1, 0, 0, 2]))), Case("none", (tokens, index([])))]


def errors() -> list[Error]:
    x, i = torch.randn(5, 7), index([0, 1])
    return [
        Error("vtok::pack: expected tokens of shape (S, D), got (7,)", (x[0], i)),
        Error("vtok::pack: expected index of shape (K,), got (1, 2)", (x, i[None])),
        Error("vtok::pack: expected index of dtype int64, got int32", (x, i.int())),
        Error("vtok::pack: expected index in [-1, 5), got 2 values outside", (x, index([5, -2, 0])), only_cpu=True),
    ]


def host(kernels, tokens, index):
    out = poisoned((index.shape[0], tokens.shape[1]), tokens.dtype)
    source = to_numpy(tokens)
    row = source.itemsize * source.shape[1]
    if out.size:
        kernels.pack(source, source.shape[0], row, row, to_numpy(index), index.shape[0], out)
    return from_numpy(out, tokens.dtype)


@pytest.mark.parametrize("column", range(1, 4))
def test_unaligned_rows(host_kernels, column):
    """Rows that start off a 16-byte boundary take a narrower word, not a fault."""
    wide = to_numpy(randn((4, 64), torch.bfloat16))
    view, out = wide[:, column : column + 32], poisoned((2, 32), torch.bfloat16)
    flat = wide.reshape(-1)[column:].copy()
    host_kernels.pack(flat, 3, 128, 64, to_numpy(index([2, 0])), 2, out)
    assert (out == view[[2, 0]]).all()


def test_more_than_2_31_elements():
    """Row offsets are 64-bit: a strided view whose last row lies beyond 2^31 elements."""
    buffer = torch.zeros(2**31 + 64, dtype=torch.uint8)
    tokens = buffer.as_strided((3, 32), (2**30 + 8, 1))
    tokens[2] = torch.arange(32, dtype=torch.uint8)
    assert torch.equal(vtok.ops.pack(tokens, index([2, 0]))[0], torch.arange(32, dtype=torch.uint8))


@pytest.mark.skipif(not _load.loaded, reason="needs the compiled kernels")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs a kernel with huge pages")
def test_large_outputs_ask_for_huge_pages():
    """What allocates is common to all ops."""
    size = 48 << 20
    tokens = torch.zeros(2, size // 2, dtype=torch.uint8)
    rows = vtok.ops.pack(tokens, index([1, 0]))
    assert "hg" in flags_of(rows.data_ptr() + size // 2)


def flags_of(address: int) -> list[str]:
    """What the kernel says of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0]:
            begin, end = (int(number, 16) for number in fields[0].split("-"))
            inside = begin <= address < end
        elif inside and fields[0] == "VmFlags:":
            return fields[1:]
    raise AssertionError(f"{address:x} is in no mapping")
