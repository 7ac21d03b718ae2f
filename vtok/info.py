"""What runs here, for a bug report: the standard library and torch alone. A probe that fails says why; none raises."""

from __future__ import annotations

import importlib.metadata
import platform
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from vtok import _load, _version
from vtok.ops._rooms import ROOMS, backend_of

DEVICES = ("cpu", "cuda")
_FATBIN = struct.pack("<I", 0xBA55ED50)  # starts each embedded container of GPU code


def report() -> dict[str, dict[str, str]]:
    """Sections of names and values: versions, the binary, the devices, and the backend of each op per device."""
    probes: dict[str, dict[str, Callable[[], object]]] = {
        "versions": {
            "vtok": lambda: _version.__version__,
            "torch": lambda: torch.__version__,
            "triton": lambda: importlib.metadata.version("triton"),
            "python": lambda: sys.version.split()[0],
            "platform": platform.platform,
        },
        "binary": {
            "loaded": lambda: _load.PATH if _load.loaded else f"no: {_load.problem}",
            "CPU kernels": _load.cpu_isa,
            "CUDA code for": lambda: ", ".join(cuda_code(_load.PATH)) or "none",
            "ops with CUDA kernels": lambda: f"{len(_load.cuda_ops)} of {len(ROOMS)}",
        },
        "devices": {
            "CUDA of torch": lambda: torch.version.cuda or torch.version.hip or "none",
            "driver": _driver,
            "CUDA devices": _cuda_devices,
        },
    }
    filled = {section: {name: _guarded(probe) for name, probe in some.items()} for section, some in probes.items()}
    return filled | {"backends": backends()}


def backends() -> dict[str, str]:
    """Each op with what serves it on each device."""
    return {
        op: ", ".join(f"{device} {_guarded(partial(backend_of, op, device))}" for device in DEVICES)
        for op in sorted(ROOMS)
    }


def text() -> str:
    lines = []
    for section, values in report().items():
        lines += [section, *(f"  {name:24} {value}" for name, value in values.items())]
    return "\n".join(lines)


def cuda_code(library: Path) -> list[str]:
    """The architectures a library has code for, "sm_90" or "compute_90" (PTX), by the headers of its fat binaries."""
    data = library.read_bytes()
    found = set()
    start = data.find(_FATBIN)
    while start >= 0:
        header, size = struct.unpack_from("<HQ", data, start + 6)
        at, end = start + header, start + header + size
        while at < end:
            kind, _, entry_header, entry_size, _, _, _, _, arch = struct.unpack_from("<HHIQIIHHI", data, at)
            found.add((arch, "compute" if kind == 1 else "sm"))
            at += entry_header + max(1, entry_size)
        start = data.find(_FATBIN, max(end, start + 4))
    return [f"{kind}_{arch}" for arch, kind in sorted(found)]


def _driver() -> str:
    proc = Path("/proc/driver/nvidia/version")
    return proc.read_text().splitlines()[0] if proc.exists() else "none"


def _cuda_devices() -> str:
    names = []
    for i in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(i)
        names.append(f"{of.name} (sm_{of.major}{of.minor}, {of.total_memory / 2**30:.0f} GiB)")
    return "; ".join(names) or "none"


def _guarded(probe: Callable[[], object]) -> str:
    try:
        return str(probe())
    except Exception as error:
        sentence = str(error).strip().splitlines()
        return f"unknown: {type(error).__name__}" + (f": {sentence[0]}" if sentence else "")
