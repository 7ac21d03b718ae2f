"""Loads the compiled kernels, vtok/_C.so, and keeps the reason where that fails."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

PATH = Path(__file__).with_name("_C.so")

loaded = False
problem: str | None = None
cpu_ops: frozenset[str] = frozenset()  # ops that the binary defines, with their CPU kernels
cuda_ops: frozenset[str] = frozenset()  # ops whose CUDA C++ kernels are in the binary


def load() -> None:
    """Load the binary once; importing never touches CUDA. On failure ``problem`` holds one sentence."""
    global loaded, problem, cpu_ops, cuda_ops
    if loaded or problem:
        return
    if not PATH.exists():
        problem = "this build has none (py3-none-any); the references and Triton serve"
        return
    try:
        torch.ops.load_library(str(PATH))
    except (OSError, RuntimeError) as error:
        problem = f"_C.so does not load with torch {torch.__version__}: {str(error).splitlines()[0]}"
        return
    loaded = True
    names = torch._C._dispatch_get_all_op_names()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    cpu_ops = frozenset(name[6:] for name in names if name.startswith("vtok::"))
    cuda_ops = frozenset(name for name in cpu_ops if has(f"vtok::{name}", "CUDA"))


def cpu_isa(wanted: str | None = None) -> str:
    """The instruction set of the CPU kernels: "portable", "avx2" or "avx512"; ``wanted`` asks for another one."""
    if not loaded:
        return "none"
    function = ctypes.CDLL(str(PATH)).vtok_cpu_isa
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    return function(wanted.encode() if wanted else None).decode()
