"""Finds the rooms, registers each op with torch, and decides which backend serves which device."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from vtok import _load

ROOMS: dict[str, ModuleType] = {}
_library = torch.library.Library("vtok", "FRAGMENT")
_triton_keys: dict[str, str] = {}  # device type -> dispatch key, where Triton serves


def register_all() -> None:
    """Define what the binary did not define, and give every op its fake, its gradient and its other backends."""
    _load.load()
    for info in pkgutil.iter_modules(importlib.import_module("vtok.ops").__path__):
        if not info.name.startswith("_"):
            ROOMS[info.name] = importlib.import_module(f"vtok.ops.{info.name}")
    for name, room in ROOMS.items():
        _register(name, room)
    if _load.problem:
        warnings.warn(f"vtok runs without its compiled kernels: {_load.problem}", stacklevel=4)


def _register(name: str, room: ModuleType) -> None:
    if name not in _load.cpu_ops:
        _library.define(room.SCHEMA)
    _library.impl(name, room.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vtok::{name}", room.fake)
    if hasattr(room, "backward"):
        torch.library.register_autograd(f"vtok::{name}", room.backward, setup_context=room.setup_context)
    if _wants_triton("cuda") or name not in _load.cuda_ops:
        _serve(name, "cuda", "CUDA")
    _serve(name, "xpu", "XPU")


def _wants_triton(device: str) -> bool:
    return device == "cuda" and (os.environ.get("VTOK_BACKEND") == "triton" or torch.version.hip is not None)


def _serve(name: str, device: str, key: str) -> None:
    """Triton on this key, loaded at the first call; without Triton a call says so instead of falling back."""
    available = importlib.util.find_spec("triton") is not None
    kernel = _lazy_triton(name) if available else _refuse(name, device)
    _library.impl(name, kernel, key, allow_override=True)
    if available:
        _triton_keys[device] = key


def _lazy_triton(name: str) -> Callable:
    launcher: Callable | None = None

    def call(*args, **kwargs):
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(f"vtok.triton_kernels.{name}"), name)
        with torch.get_device_module(args[0].device).device(args[0].device):  # Triton launches on the current one
            return launcher(*args, **kwargs)

    return call


def _refuse(name: str, device: str) -> Callable:
    def call(*args, **kwargs):
        raise RuntimeError(
            f"vtok::{name}: expected kernels for {device}, got a build without CUDA and no Triton; "
            "install triton, or build with VTOK_CUDA=on"
        )

    return call


def backend_of(op: str, device: str | torch.device = "cpu") -> str:
    """Which implementation of ``op`` serves ``device``: "cpp", "cuda", "triton" or "reference".

    Raises ValueError for an unknown op, RuntimeError for a device that has no kernels.
    """
    if op not in ROOMS:
        raise ValueError(f"expected one of the ops {sorted(ROOMS)}, got {op!r}")
    kind = torch.device(device).type
    if kind == "cpu":
        return "cpp" if op in _load.cpu_ops else "reference"
    if kind in _triton_keys and (kind != "cuda" or _wants_triton("cuda") or op not in _load.cuda_ops):
        return "triton"
    if kind == "cuda":
        if op in _load.cuda_ops:
            return "cuda"
        raise RuntimeError(f"expected kernels of {op} for cuda, got a build without CUDA and no Triton")
    if kind == "xpu":
        raise RuntimeError(f"expected kernels of {op} for xpu, got no Triton")
    return "reference"
