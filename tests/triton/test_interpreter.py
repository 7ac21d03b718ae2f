"""Every room's Triton kernels in the interpreter, over its cases()."""

from __future__ import annotations

import importlib

import pytest
import torch

from vtok.ops._rooms import ROOMS

from rooms import TEST_ROOMS, all_cases, check, row_slice, strided

LAYOUTS = {"dense": lambda x: x, "strided": strided, "row_slice": row_slice}
OF_CASE = (("dense", "strided"), ("dense", "row_slice"))  # one after the other; the rest with --sweep


def launcher(op: str):
    return getattr(importlib.import_module(f"vtok.triton_kernels.{op}"), op)


@pytest.mark.parametrize(
    "layout, op, case",
    [
        pytest.param(
            name, op, case, marks=() if name in OF_CASE[n % 2] else pytest.mark.sweep, id=f"{name}-{op}-{case}"
        )
        for n, (op, case) in enumerate(all_cases())
        for name in LAYOUTS
    ],
)
def test_kernels(layout, op, case):
    args = [LAYOUTS[layout](a) if isinstance(a, torch.Tensor) else a for a in case.args]
    check(op, launcher(op)(*args, **case.kwargs), case)


@pytest.mark.parametrize("op", sorted(ROOMS))
def test_errors_say_the_same(op):
    for error in TEST_ROOMS[op].errors():
        if not error.only_cpu:
            with pytest.raises(RuntimeError) as caught:
                launcher(op)(*error.args, **error.kwargs)
            assert str(caught.value) == error.message
