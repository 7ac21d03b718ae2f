"""The contract of every op (DESIGN.md section 4) on a real device, as built and again under VTOK_BACKEND=triton."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from device import DEVICE, cases_of, largest, on_device, on_host
from test_contract import by_signature

import vtok
from vtok.bench.suite import Subject, expected, verify
from vtok.bench.workload import modules
from vtok.ops._rooms import ROOMS

from rooms import ROOT, TEST_ROOMS, Case, all_cases, check, op_of, outputs, row_slice, same_bits, strided

BACKEND = "triton" if os.environ.get("VTOK_BACKEND") == "triton" or torch.version.hip else "cuda"
SLEEP_CYCLES = 40_000_000  # some 20 ms
CASES = all_cases()
OPS = sorted(ROOMS)
over_cases = pytest.mark.parametrize("op, case", CASES, ids=[f"{op}-{case}" for op, case in CASES])
over_ops = pytest.mark.parametrize("op", OPS)
one_at_a_time = pytest.mark.xdist_group("memory")


def run(op: str, case: Case, args: tuple | None = None):
    return op_of(op)(*(on_device(case.args) if args is None else args), **case.kwargs)


def judge(op: str, got, case: Case) -> None:
    check(op, on_host(got), case)


def zeros(args: tuple) -> tuple:
    return tuple(torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in args)


def fill(args: tuple, values: tuple) -> None:
    for target, value in zip(args, values, strict=True):
        if isinstance(target, torch.Tensor):
            target.copy_(value)


@over_ops
def test_is_served_by(op):
    assert vtok.backend_of(op, DEVICE) == BACKEND


@over_cases
def test_equals_the_reference(op, case):
    judge(op, run(op, case), case)


@over_cases
@pytest.mark.parametrize("layout", [strided, row_slice])
def test_strides_do_not_matter(op, case, layout):
    args = tuple(layout(a.to(DEVICE)) if isinstance(a, torch.Tensor) else a for a in case.args)
    judge(op, run(op, case, args), case)


@over_cases
def test_fifty_runs_are_bit_equal(op, case):
    args = on_device(case.args)
    first = outputs(run(op, case, args))
    for _ in range(50):
        assert all(map(same_bits, outputs(run(op, case, args)), first))


@over_cases
def test_never_syncs(op, case):
    args = on_device(case.args)
    run(op, case, args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(op, case, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    judge(op, got, case)


@over_cases
def test_captured_graph_takes_other_data(op, case):
    """Captured over zeros, replayed over the case: nothing of the data is baked in, and capture allows no sync."""
    values = on_device(case.args)
    args = zeros(values)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        run(op, case, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(op, case, args)
    fill(args, values)
    for output in outputs(got):
        output.zero_()
    for _ in range(2):
        graph.replay()
        judge(op, got, case)


@over_ops
def test_runs_on_the_current_stream(op):
    """Behind a long sleep on a side stream the arguments arrive late; the host does not wait for any of it."""
    for case in largest(op, 4):
        values = on_device(case.args)
        args = zeros(values)
        run(op, case, args)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP_CYCLES)
            fill(args, values)
            got = run(op, case, args)
            done = side.record_event()
        assert not done.query(), f"{op}[{case}] waited for the device"
        side.synchronize()
        judge(op, got, case)


@over_ops
def test_compiles_whole_without_recompiling(op):
    for group in by_signature(op):
        torch._dynamo.reset()
        call = lambda *args, kw=group[0].kwargs: op_of(op)(*args, **kw)  # noqa: E731
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            for case in group:
                judge(op, compiled(*on_device(case.args)), case)


@over_ops
def test_compiles_to_a_cuda_graph(op):
    case = largest(op, 1)[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op_of(op)(*args, **case.kwargs), mode="reduce-overhead", fullgraph=True)
    args = on_device(case.args)
    for _ in range(3):  # warm-up, recording, replay
        torch.compiler.cudagraph_mark_step_begin()
        judge(op, compiled(*args), case)


@pytest.mark.parametrize("op", [op for op in OPS if hasattr(ROOMS[op], "backward")])
def test_gradients_equal_the_cpu_s(op):
    for case in TEST_ROOMS[op].grad_cases():
        gradients = []
        for device in (torch.device("cpu"), DEVICE):
            args = tuple(
                a.detach()
                .to(device, torch.float32 if a.is_floating_point() else a.dtype)
                .requires_grad_(a.requires_grad)
                if isinstance(a, torch.Tensor)
                else a
                for a in case.args
            )
            floats = [t for t in outputs(run(op, case, args)) if t.requires_grad]
            torch.autograd.backward(floats, [torch.ones_like(t) for t in floats])
            gradients.append([a.grad for a in args if isinstance(a, torch.Tensor) and a.requires_grad])
        for cpu, device in zip(*gradients, strict=True):
            torch.testing.assert_close(device.cpu(), cpu)


@over_ops
def test_errors_say_the_same(op):
    for error in TEST_ROOMS[op].errors():
        if not error.only_cpu:
            with pytest.raises(RuntimeError) as caught:
                op_of(op)(*on_device(error.args), **error.kwargs)
            assert str(caught.value) == error.message


REAL = [(op, w) for op, module in modules().items() for w in module.workloads() if not w.gpu_only]


@one_at_a_time
@pytest.mark.parametrize("op, workload", REAL, ids=[f"{op}-{w.name.replace(' ', '-')}" for op, w in REAL])
def test_real_sizes(op, workload):
    subject, args = Subject(op, modules()[op]), workload.make(DEVICE)
    verify(subject.run(*args, **workload.kwargs), expected(subject, workload, args), workload.exact)


# --- more than 2^31 elements -------------------------------------------------------------------------------------

BEYOND = 2**31 + 64
PLANTED = [5, 2**31 + 7, 2**31 + 40]


def room_for(gigabytes: float) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB on the device, {free:.0f} are free")


def far_apart(tokens: torch.Tensor) -> torch.Tensor:
    """The same rows, the last of which begins beyond element 2^31."""
    rows, columns = tokens.shape
    stride = BEYOND // (rows - 1) + columns
    buffer = torch.empty(stride * (rows - 1) + columns, dtype=tokens.dtype, device=DEVICE)
    return buffer.as_strided((rows, columns), (stride, 1)).copy_(tokens)


def far_cases(op: str) -> list[Case]:
    found = [case for case in cases_of(op) if case.args[0].dim() == 2 and min(case.args[0].shape) >= 2]
    return sorted(found, key=lambda case: case.args[0].element_size())[:2]


@one_at_a_time
@pytest.mark.parametrize("op", [op for op in OPS if far_cases(op)])
def test_rows_beyond_2_31_elements(op):
    for case in far_cases(op):
        room_for(3 * BEYOND * case.args[0].element_size() / 1e9)
        args = on_device(case.args)
        judge(op, run(op, case, (far_apart(args[0]), *args[1:])), case)


def planted(fill: float | int | bool, values: list, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.full((BEYOND,), fill, dtype=dtype, device=DEVICE)
    tensor[torch.tensor(PLANTED, device=DEVICE)] = torch.tensor(values, dtype=dtype, device=DEVICE)
    return tensor


def whole(*values: int) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


def topk_beyond():
    index = vtok.ops.topk(planted(-1, [3, 2, 9], torch.float32), whole(0, BEYOND), whole(0, 3), 3)
    return index.tolist(), PLANTED


def compact_beyond():
    index, counts = vtok.ops.compact(planted(False, [True] * 3, torch.bool), whole(0, BEYOND), 4)
    return (index.tolist(), counts.tolist()), ([*PLANTED, -1], [3])


def group_beyond():
    members, offsets = vtok.ops.group(planted(-1, [1, 0, 1], torch.int64), 2)
    return (members[:4].tolist(), offsets.tolist()), ([PLANTED[1], PLANTED[0], PLANTED[2], -1], [0, 1, 3])


ONE_DIMENSIONAL = {"topk": (topk_beyond, 45), "compact": (compact_beyond, 40), "group": (group_beyond, 75)}


@one_at_a_time
@pytest.mark.parametrize("op", [op for op in ONE_DIMENSIONAL if op in ROOMS])
def test_more_than_2_31_rows(op):
    call, gigabytes = ONE_DIMENSIONAL[op]
    room_for(gigabytes)
    got, want = call()
    assert got == want


# --- what may kill the process, or needs more than one device ----------------------------------------------------


@over_ops
def test_wild_indices_touch_nothing_outside(op):
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "device.py"), "--wild", op]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]


@over_ops
def test_runs_on_the_device_of_its_tensors(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    case = largest(op, 1)[0]
    got = run(op, case, on_device(case.args, torch.device("cuda", 1)))
    assert all(t.device.index == 1 for t in outputs(got)) and torch.cuda.current_device() == 0
    judge(op, got, case)
