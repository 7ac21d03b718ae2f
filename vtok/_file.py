"""Packed on disk: one safetensors file, checked as a stranger's when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtok.layout import Layout

if TYPE_CHECKING:
    from vtok.packed import Packed

FORMAT = "vtok.Packed 1"
TENSORS = ("values", "index", "cu_seqlens", "positions", "weight", "assignment")
OPTIONAL = ("scores", "counts", "sizes", "shares", "gap", "order", "vectors")
DTYPES = dict.fromkeys(("index", "cu_seqlens", "positions", "assignment", "counts", "order", "vectors"), torch.int64)
DTYPES |= dict.fromkeys(("weight", "scores", "sizes", "shares"), torch.float32) | {"gap": torch.float64}


def save(packed: Packed, path: str | Path, *, overwrite: bool) -> None:
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: getattr(packed, name) for name in (*TENSORS, *OPTIONAL)}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if t is not None}
    layout = {"grids": packed.layout.grids, "extra_rows": packed.layout.extra_rows}
    head = layout | {"merged": packed.is_merged, "as_released": packed.as_released}
    if not overwrite:
        path.open("xb").close()  # claims the name: FileExistsError where something is
    try:
        save_file(tensors, path, {"format": FORMAT, "layout": json.dumps(head)})
    except BaseException:
        if not overwrite:
            path.unlink(missing_ok=True)
        raise


def load(path: str | Path, device: torch.device | str) -> Packed:
    from safetensors import SafetensorError, safe_open

    from vtok.packed import Packed

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in (*TENSORS, *OPTIONAL)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got one that cannot be read: {error}") from None
    layout, made = _layout(path, metadata)
    _check(path, tensors, layout)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    longest = int(tensors["cu_seqlens"].diff().amax()) if layout.videos else 0
    return Packed(layout=layout.to(device), longest=longest, **made, **tensors)


def _layout(path: str | Path, metadata: dict[str, str]) -> tuple[Layout, dict[str, Any]]:
    _expect(path, metadata.get("format") == FORMAT, f"format {FORMAT!r}", repr(metadata.get("format")))
    try:
        head = json.loads(metadata["layout"])
        grids, extra_rows = head["grids"], head["extra_rows"]
        made = {"is_merged": head["merged"], "as_released": head.get("as_released", False)}
        _expect(path, isinstance(grids, list), "grids as a list", "something else")
        _expect(path, all(isinstance(flag, bool) for flag in made.values()), "flags as bool", "something else")
        return Layout.from_grid(grids, extra_rows=extra_rows), made
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: expected a layout of host integers, got one that cannot be read: {error}") from None


def _check(path: str | Path, tensors: dict[str, Tensor], layout: Layout) -> None:
    missing = sorted(set(TENSORS) - set(tensors))
    _expect(path, not missing, f"the tensors {', '.join(TENSORS)}", f"none of {', '.join(missing)}")
    values, index, cu_seqlens = tensors["values"], tensors["index"], tensors["cu_seqlens"]
    _expect(path, values.dim() == 2 and index.dim() == 1, "values [K, D] and index [K]", tuple(values.shape))
    rows, source, videos = index.shape[0], layout.total, layout.videos
    shapes: dict[str, Any] = {
        "values": (rows, values.shape[1]), "positions": (rows, 3), "weight": (rows,), "cu_seqlens": (videos + 1,),
        "assignment": (source,), "scores": (source,), "sizes": (source,), "shares": (source,), "counts": (videos,),
        "gap": (), "order": (rows,), "vectors": (source, 2),
    }  # fmt: skip
    for name, tensor in tensors.items():
        wanted = DTYPES.get(name, tensor.dtype)
        _expect(path, tensor.dtype == wanted, f"{name} of dtype {wanted}", tensor.dtype)
        shape = shapes.get(name, tuple(tensor.shape))
        _expect(path, tuple(tensor.shape) == shape, f"{name} of shape {shape}", tuple(tensor.shape))
    kept = int(cu_seqlens[-1])
    ascending = bool((cu_seqlens.diff() >= 0).all()) and int(cu_seqlens[0]) == 0 and kept <= rows
    _expect(path, ascending, f"cu_seqlens ascending from 0 to at most {rows}", cu_seqlens.tolist()[:8])
    real, padding = index[:kept], index[kept:]
    inside = bool(((real >= 0) & (real < source)).all()) and bool((padding == -1).all())
    _expect(path, inside, f"index in [0, {source}), then -1", "values outside")
    in_order = bool((real.diff() > 0).all()) and torch.equal(torch.searchsorted(real, layout.cu_seqlens), cu_seqlens)
    _expect(path, in_order, "index ascending, each video's rows in its own part", "another order")
    order = tensors.get("order", torch.arange(rows))
    _expect(path, torch.equal(order.sort().values, torch.arange(rows)), f"order of {rows} rows", "another list")
    assignment = tensors["assignment"]
    _expect(
        path, bool(((assignment >= -1) & (assignment < kept)).all()), f"assignment in [-1, {kept})", "values outside"
    )


def _expect(path: str | Path, ok: bool, expected: str, got: Any) -> None:
    if not ok:
        raise ValueError(f"{path}: expected {expected}, got {got}")
