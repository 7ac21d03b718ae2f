"""Every room's Triton kernels in the interpreter, over its cases()."""

from __future__ import annotations

import importlib

import pytest
import torch

from vtok.ops._rooms import ROOMS

from rooms import TEST_ROOMS, all_cases, check, row_slice, strided

CASES = all_cases()
over_cases = pytest.mark.parametrize("op, case", CASES, ids=[f"{op}-{case}" for op, case in CASES])


def launcher(op: str):
    return getattr(importlib.import_module(f"vtok.triton_kernels.{op}"), op)


@over_cases
@pytest.mark.parametrize("layout", [lambda x: x, strided, row_slice], ids=["dense", "strided", "row_slice"])
def test_kernels(op, case, layout):
    args = [layout(a) if isinstance(a, torch.Tensor) else a for a in case.args]
    check(op, launcher(op)(*args, **case.kwargs), case)


@pytest.mark.parametrize("op", sorted(ROOMS))
def test_errors_say_the_same(op):
    for error in TEST_ROOMS[op].errors():
        if not error.only_cpu:
            with pytest.raises(RuntimeError) as caught:
                launcher(op)(*error.args, **error.kwargs)
            assert str(caught.value) == error.message
