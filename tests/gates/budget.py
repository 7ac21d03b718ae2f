"""bench/budget.json: what every kernel takes at the sizes of the benchmark; `make budget` writes it anew."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import triton
from kernels import TARGETS, cuda_kernels, ops, triton_kernels, workload_launches

from rooms import ROOT

# Bytes of shared memory that depend on what else is in the compile unit: alignment, and what sm_90 and later reserve.
SLACK = {"sm_80": 15, "sm_90": 15 + 1024, "sm_100": 15 + 1024, "gfx942": 0}
PATH = ROOT / "bench" / "budget.json"
Budget = dict[str, dict[str, list[int]]]  # kernel -> architecture -> [registers, shared bytes]


def compilers() -> dict[str, str | None]:
    nvcc = shutil.which("nvcc")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    release = re.search(r"release ([\d.]+)", text)
    return {"nvcc": release and release[1], "triton": triton.__version__}


def cuda_budget() -> Budget:
    found = [(f"cuda {k.name}", arch, k) for arch in TARGETS if arch != "gfx942" for k in cuda_kernels(arch)]
    return collect(found)


def triton_budget() -> Budget:
    launches = [launch for op in ops() for launch in workload_launches(op)]
    return collect((f"triton {k.name}", arch, k) for arch in TARGETS for k in triton_kernels(arch, launches))


def collect(found) -> Budget:
    """The most that any specialisation of a kernel takes."""
    budget: Budget = {}
    for name, arch, kernel in found:
        registers, shared = budget.setdefault(name, {}).get(arch, (0, 0))
        budget[name][arch] = [max(registers, kernel.registers), max(shared, kernel.shared)]
    return budget


def over(now: Budget, allowed: Budget) -> list[str]:
    """What grew, appeared or went: registers may grow by 8, shared memory by the unit's slack."""
    problems = [f"{name} is in bench/budget.json and nowhere else" for name in allowed.keys() - now.keys()]
    for name, archs in now.items():
        for arch, (registers, shared) in archs.items():
            if arch not in allowed.get(name, {}):
                problems.append(f"{name} on {arch} is not in bench/budget.json")
                continue
            most, shared_most = allowed[name][arch]
            if registers > most + 8:
                problems.append(f"{name} on {arch}: {registers} registers, budget {most}")
            if shared > shared_most + SLACK[arch]:
                problems.append(f"{name} on {arch}: {shared} bytes of shared memory, budget {shared_most}")
    return problems


def write() -> None:
    kernels = cuda_budget() | triton_budget()
    lines = [f"    {json.dumps(name)}: {json.dumps(archs)}" for name, archs in sorted(kernels.items())]
    head = f'{{\n  "compilers": {json.dumps(compilers())},\n  "kernels": {{\n'
    PATH.write_text(head + ",\n".join(lines) + "\n  }\n}\n")


if __name__ == "__main__":
    write()
