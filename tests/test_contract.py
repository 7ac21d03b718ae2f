"""The contract of every op (DESIGN.md section 4), over the cases() of its test room."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from torch.utils._pytree import tree_map_only

from vtok import _load
from vtok.ops._rooms import ROOMS

from rooms import ROOT, TEST_ROOMS, Case, all_cases, check, op_of, outputs, row_slice, same_bits, strided

CASES = all_cases()
IDS = [f"{op}-{case}" for op, case in CASES]
over_cases = pytest.mark.parametrize("op, case", CASES, ids=IDS)
over_ops = pytest.mark.parametrize("op", sorted(ROOMS))
SEEDS = int(os.environ.get("VTOK_HOST_SEEDS", "2"))  # orders of warps and blocks
ISAS = [isa for isa in ("portable", "avx2", "avx512") if _load.cpu_isa(isa) == isa]


@pytest.fixture
def isa(request):
    before = _load.cpu_isa()
    _load.cpu_isa(request.param)
    yield request.param
    _load.cpu_isa(before)


@over_ops
def test_room_is_complete(op):
    floors = [
        f"csrc/{op}/{op}.cpp", f"csrc/{op}/{op}_cpu.inc", f"csrc/{op}/{op}.cuh", f"csrc/{op}/{op}.cu",
        f"triton_kernels/{op}.py", f"vtok/ops/{op}.py", f"tests/ops/test_{op}.py", f"bench/bench_{op}.py",
    ]  # fmt: skip
    assert [f for f in floors if not (ROOT / f).exists()] == []
    assert op in _load.cpu_ops
    assert ROOMS[op].SCHEMA.startswith(f"{op}(")
    assert {"cases", "errors", "host"} <= set(dir(TEST_ROOMS[op]))
    assert hasattr(ROOMS[op], "backward") == hasattr(TEST_ROOMS[op], "grad_cases")


@over_ops
def test_schema_is_the_one_built(op):
    assert str(getattr(torch.ops.vtok, op).default._schema) == f"vtok::{ROOMS[op].SCHEMA}"


@over_cases
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_cpu(op, case, isa):
    check(op, op_of(op)(*case.args, **case.kwargs), case)


@over_cases
@pytest.mark.parametrize("seed", range(SEEDS))
def test_host_build(op, case, seed, host_kernels):
    host_kernels.seed(seed)
    check(op, TEST_ROOMS[op].host(host_kernels, *case.args, **case.kwargs), case)


@over_cases
@pytest.mark.parametrize("layout", [strided, row_slice])
def test_strides_do_not_matter(op, case, layout):
    args = [layout(a) if isinstance(a, torch.Tensor) else a for a in case.args]
    for a, b in zip(
        outputs(op_of(op)(*args, **case.kwargs)), outputs(op_of(op)(*case.args, **case.kwargs)), strict=True
    ):
        assert same_bits(a, b)


@over_cases
def test_opcheck(op, case):
    has_nan = any(a.is_floating_point() and bool(a.isnan().any()) for a in case.args if isinstance(a, torch.Tensor))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests += () if has_nan else ("test_aot_dispatch_dynamic",)  # it compares NaN with NaN and calls them different
    torch.library.opcheck(getattr(torch.ops.vtok, op).default, case.args, case.kwargs, test_utils=tests)


def finite(result) -> tuple[torch.Tensor, ...]:
    """Sentinels of infinity, which no difference quotient survives, as zeros."""
    return tuple(torch.where(out.isfinite(), out, 0) for out in outputs(result))


@pytest.mark.parametrize("op", sorted(op for op in ROOMS if hasattr(ROOMS[op], "backward")))
def test_gradients(op):
    for case in TEST_ROOMS[op].grad_cases():
        torch.autograd.gradcheck(lambda *args, kw=case.kwargs: finite(op_of(op)(*args, **kw)), case.args)


@over_ops
def test_errors_say_the_same_everywhere(op):
    for error in TEST_ROOMS[op].errors():
        for run in (op_of(op), ROOMS[op].reference):
            with pytest.raises(RuntimeError) as caught:
                run(*error.args, **error.kwargs)
            assert str(caught.value) == error.message
        if not error.only_cpu:
            with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError) as caught:
                args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (error.args, error.kwargs))
                op_of(op)(*args, **kwargs)
            assert error.message in str(caught.value)


def by_signature(op: str) -> list[list[Case]]:
    """Cases that differ in sizes alone: one compiled graph must serve all of them."""
    groups: dict[tuple, list[Case]] = {}
    for name, case in CASES:
        tensors = [a for a in case.args if isinstance(a, torch.Tensor)]
        sizes = [size for a in case.args for size in (a.shape if isinstance(a, torch.Tensor) else [a])]
        if name == op and all(size >= 2 for size in sizes if isinstance(size, int)):
            key = tuple((a.dtype, a.dim()) for a in tensors), repr(sorted(case.kwargs.items(), key=str))
            groups.setdefault(key, []).append(case)
    return list(groups.values())


@over_ops
def test_compiles_whole_without_recompiling(op):
    for group in by_signature(op):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *args, kw=group[0].kwargs: op_of(op)(*args, **kw), backend="aot_eager", fullgraph=True, dynamic=True
        )
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            for case in group:
                check(op, compiled(*case.args), case)


@over_ops
def test_exports(op):
    case = next(case for name, case in CASES if name == op)

    class Model(torch.nn.Module):
        def forward(self, *args):
            return op_of(op)(*args, **case.kwargs)

    program = torch.export.export(Model(), case.args)
    check(op, program.module()(*case.args), case)


@over_cases
def test_runs_are_bit_equal(op, case):
    first = outputs(op_of(op)(*case.args, **case.kwargs))
    for _ in range(3):
        assert all(map(same_bits, outputs(op_of(op)(*case.args, **case.kwargs)), first))


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


def allocated() -> int:
    """Bytes that this process holds from malloc."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return info.field7 + info.field4  # uordblks, hblkhd


@over_ops
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_calls_leave_no_memory_behind(op):
    """torch's conversion of a string argument would leave 48 bytes a call."""
    case, calls = next(case for other, case in CASES if other == op), 2000
    with torch.inference_mode():
        for call in range(100 + calls):
            if call == 100:
                before = allocated()
            op_of(op)(*case.args, **case.kwargs)
    assert allocated() - before < 8 * calls
