"""The argument checks of the ops, one sentence each; csrc/common/stable.h spells the same sentences in C++."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def expect(ok, op: str, expected, got) -> None:
    """Raise RuntimeError ``vtok::<op>: expected <expected>, got <got>`` unless ``ok``; traces under fake tensors."""
    torch._check(ok, lambda: f"vtok::{op}: expected {expected}, got {got}")


def shape_text(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def expect_dim(op: str, name: str, tensor: Tensor, dim: int, shape: str) -> None:
    expect(tensor.dim() == dim, op, f"{name} of shape {shape}", shape_text(tensor))


def expect_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    expect(tensor.dtype == dtype, op, f"{name} of dtype {dtype_text(dtype)}", dtype_text(tensor.dtype))


def expect_float(op: str, name: str, tensor: Tensor) -> None:
    floats = "float32, float16, bfloat16 or float64"
    expect(tensor.dtype in FLOATS, op, f"{name} of dtype {floats}", dtype_text(tensor.dtype))


def expect_same_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    expect(tensor.device == like.device, op, f"{name} on {like.device}", tensor.device)


def expect_index(op: str, name: str, tensor: Tensor, like: Tensor, shape: str) -> None:
    """A one-dimensional int64 argument on the device of ``like``."""
    expect_dim(op, name, tensor, 1, shape)
    expect_dtype(op, name, tensor, torch.int64)
    expect_same_device(op, name, tensor, like)


def expect_cu_seqlens(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Segment boundaries [V+1]: at least the leading zero."""
    expect_index(op, name, tensor, like, "(V+1,)")
    expect(tensor.shape[0] >= 1, op, f"{name} of shape (V+1,)", shape_text(tensor))


def expect_all_in_range(op: str, name: str, index: Tensor, rows: int) -> None:
    """Every value in [-1, rows). Only where looking costs no sync: elsewhere such a row is padding."""
    if index.device.type == "cpu":
        bad = int(((index < -1) | (index >= rows)).sum())
        expect(bad == 0, op, f"{name} in [-1, {rows})", f"{bad} values outside")


def expect_ascending(op: str, name: str, tensor: Tensor, limit: int | None = None, limit_name: str = "") -> None:
    """Boundaries that start at 0, never fall, and end at ``limit`` at most. Only where looking costs no sync."""
    if tensor.device.type == "cpu" and tensor.numel():
        bad = tensor < torch.cat([tensor[:1], tensor[:-1]])
        bad[0] = tensor[0] != 0
        bad |= False if limit is None else tensor > limit
        first = int(bad.byte().argmax())
        to = "" if limit is None else f" to at most {limit_name}={limit}"
        expect(not bad[first], op, f"{name} ascending from 0{to}", f"{name}[{first}]={int(tensor[first])}")
