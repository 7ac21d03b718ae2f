"""What the compilers made of the kernels: registers, spills, shared memory, instructions. No GPU is needed.

CUDA kernels are read from vtok/_C.so with the cuobjdump of Triton's wheel. Triton kernels are compiled by running the
launchers themselves, over cases() and over the benchmark's sizes on the meta device, under a driver that names the
target and a JIT that compiles but launches nothing: what is compiled is what would run there.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vtok import _load

from rooms import TEST_ROOMS, all_cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Kernel:
    name: str  # with its template arguments, or its pointer types and constants
    registers: int
    shared: int  # bytes a block; Triton's includes the dynamic part
    spilled: int  # bytes a thread of local memory
    code: str = ""  # PTX or amdgcn; SASS: see cuda_code


def cuobjdump(*arguments: str) -> str:
    return subprocess.run([CUOBJDUMP, *arguments], check=True, capture_output=True, text=True).stdout


# --- CUDA ---------------------------------------------------------------------------------------------------------
def short_name(mangled: str) -> str:
    """pack_kernel<Word16> for void vtok::pack_kernel<vtok::Word16>(...)."""
    full = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout.strip()
    full = full.replace("(anonymous namespace)::", "").replace("vtok::", "").removeprefix("void ")
    depth, end = 0, 0
    for end, letter in enumerate(full):  # noqa: B007
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            break
    return full[:end]


def cuda_kernels(arch: str) -> list[Kernel]:
    found = USAGE.findall(cuobjdump("-res-usage", "-arch", arch, str(_load.PATH)))
    return [
        Kernel(short_name(name), int(registers), int(shared), int(stack) + int(local))
        for name, registers, stack, shared, local in found
    ]


def cuda_code(arch: str) -> dict[str, str]:
    """SASS by kernel; the disassembly takes some 15 seconds."""
    parts = cuobjdump("-sass", "-arch", arch, str(_load.PATH)).split("Function : ")[1:]
    return {short_name(name.strip()): body for name, _, body in (part.partition("\n") for part in parts)}


# --- Triton -------------------------------------------------------------------------------------------------------
class Target:
    """A driver that has a target and no device."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_device(self):
        return self.arch  # the JIT keeps one cache of kernels per device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.arch]


def kind_of(function: JITFunction, args: tuple, kwargs: dict) -> tuple:
    """What tells one kernel of a function from another, whatever the sizes: types, constants and options."""
    names = [parameter.name for parameter in function.params]
    given = dict(zip(names, args, strict=False)) | kwargs
    constants = {p.name for p in function.params if p.is_constexpr} | (kwargs.keys() - set(names))
    return function, *((k, v if k in constants else getattr(v, "dtype", None)) for k, v in sorted(given.items()))


@contextmanager
def compiling_for(arch: str) -> Iterator[dict]:
    """Within, a launch compiles for ``arch`` once per kind of kernel, in place of running."""
    compiled = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kind = kind_of(self, args, kwargs)
        if kind not in compiled:
            compiled[kind] = run(self, *args, grid=grid, warmup=True, **kwargs)

    driver.set_active(Target(arch))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def triton_kernels(arch: str, launches: list[Callable]) -> list[Kernel]:
    """The kernels that these calls of launchers would run."""
    with compiling_for(arch) as compiled:
        for launch in launches:
            launch()
    return [measure(kernel) for kernel in compiled.values()]


def measure(kernel) -> Kernel:
    types = [t for t in kernel.src.signature.values() if str(t).startswith("*")]  # a tuple of numbers has several
    constants = [
        f"{p.name}={kernel.src.constants[(p.num,)]}"
        for p in kernel.src.fn.params
        if p.is_constexpr and (p.num,) in kernel.src.constants
    ]
    named = Kernel(f"{kernel.name}<{', '.join(types + constants)}>", 0, kernel.metadata.shared, 0)
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        field = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
        return replace(named, registers=field["vgpr_count"], spilled=field["private_segment_fixed_size"], code=text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        ((_, registers, stack, _, local),) = USAGE.findall(cuobjdump("-res-usage", cubin.name))
    return replace(named, registers=int(registers), spilled=int(stack) + int(local), code=kernel.asm["ptx"])


def launcher(op: str) -> Callable:
    return getattr(importlib.import_module(f"vtok.triton_kernels.{op}"), op)


def case_launches(op: str) -> list[Callable]:
    cases = [case for name, case in all_cases() if name == op]
    return [lambda c=case: launcher(op)(*c.args, **c.kwargs) for case in cases]


def workload_launches(op: str) -> list[Callable]:
    """The sizes of bench/bench_<op>.py, without their data."""
    loads = importlib.import_module(f"vtok.bench.bench_{op}").workloads()
    return [lambda w=load: launcher(op)(*w.make(torch.device("meta")), **w.kwargs) for load in loads]


def ops() -> list[str]:
    all_cases()
    return sorted(TEST_ROOMS)
