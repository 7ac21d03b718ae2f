"""What the compilers made of the kernels, for GPUs that are not here."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from budget import PATH, compilers, cuda_budget, over, triton_budget
from kernels import TARGETS, case_launches, cuda_code, cuda_kernels, cuobjdump, ops, triton_kernels, workload_launches

from vtok import _load
from vtok.ops._rooms import ROOMS

ARCHS = [arch for arch in TARGETS if arch != "gfx942"]
OPS = ops()
BUDGET = json.loads(PATH.read_text())
needs_cuda = pytest.mark.skipif(not _load.cuda_ops, reason="this build has no CUDA kernels: no nvcc when it was made")
FLOAT_ATOMIC = re.compile(
    r"\b(?:ATOM[GS]?|RED[GS]?)\.[\w.]*\b(?:F16|BF16|F32|F64)"  # SASS
    r"|\b(?:atom|red)\.[\w.]*\.(?:f16|bf16|f32|f64)"  # PTX
    r"|\b\w*atomic_\w*(?:add|min|max)_\w*f(?:16|32|64)"  # amdgcn
)


def sm_90_alone(archs):
    """sm_90, and with --sweep the others."""
    return [arch if arch == "sm_90" else pytest.param(arch, marks=pytest.mark.sweep) for arch in archs]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_is_built_where_nvcc_is():
    assert _load.cuda_ops == set(ROOMS)


@needs_cuda
def test_architectures():
    listed = cuobjdump("-lelf", "-lptx", str(_load.PATH))
    for arch in ARCHS:
        assert f".{arch}.cubin" in listed
    assert f".{ARCHS[-1]}.ptx" in listed  # for GPUs that come later


@needs_cuda
@pytest.mark.parametrize("arch", ARCHS)
def test_no_cuda_kernel_spills(arch):
    assert [kernel.name for kernel in cuda_kernels(arch) if kernel.spilled] == []


@needs_cuda
@pytest.mark.parametrize("arch", sm_90_alone(ARCHS))
def test_cuda_code(arch):
    for name, code in cuda_code(arch).items():
        assert not FLOAT_ATOMIC.findall(code), name
        if "Word16" in name:
            assert "LDG.E.128" in code and "STG.E.128" in code, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", TARGETS)
def test_triton_code(op, arch):
    check_triton(arch, workload_launches(op))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", sm_90_alone(TARGETS))
def test_triton_code_of_cases(op, arch):
    check_triton(arch, case_launches(op))


def check_triton(arch, launches):
    kernels = triton_kernels(arch, launches)
    assert kernels
    for kernel in kernels:
        assert kernel.spilled == 0, kernel.name
        assert not FLOAT_ATOMIC.findall(kernel.code), kernel.name


@pytest.mark.parametrize("kind", ["cuda", "triton"])
def test_budget(kind):
    compiler = {"cuda": "nvcc", "triton": "triton"}[kind]
    if compilers()[compiler] != BUDGET["compilers"][compiler]:
        pytest.skip(f"the budget is of {compiler} {BUDGET['compilers'][compiler]}")
    allowed = {name: archs for name, archs in BUDGET["kernels"].items() if name.startswith(kind)}
    assert over({"cuda": cuda_budget, "triton": triton_budget}[kind](), allowed) == []


def test_a_grown_kernel_is_noticed():
    allowed = {"cuda k": {"sm_80": [32, 1024]}}
    assert over({"cuda k": {"sm_80": [40, 1039]}}, allowed) == []
    assert "41 registers" in over({"cuda k": {"sm_80": [41, 1024]}}, allowed)[0]
    assert "1040 bytes" in over({"cuda k": {"sm_80": [32, 1040]}}, allowed)[0]
    assert len(over({"cuda new": {"sm_80": [1, 0]}}, allowed)) == 2  # one appeared, one went


@pytest.mark.parametrize(
    "line",
    ["RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "ATOMG.E.ADD.F64", "red.global.gpu.relaxed.add.f32", "global_atomic_add_f32"],
)
def test_a_float_atomic_is_noticed(line):
    assert FLOAT_ATOMIC.search(line)
    assert not FLOAT_ATOMIC.search(line.replace("F32.FTZ.RN.", "").replace("F64", "64").replace("f32", "u32"))
