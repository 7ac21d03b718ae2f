"""Runs of a token stream: what is open at each site travels from chunk to chunk, what is closed comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout
from vtok.ops._canonical import accumulator
from vtok.packed import Packed
from vtok.sites import runs

# method -> what it fixes of the settings below
SCANS: dict[str, dict[str, Any]] = {"temporal_merge": {}, "dtd": {"reference": "previous", "reduce": "first"}}
State = dict[str, Tensor]


@dataclass(frozen=True)
class RunScan:
    """``temporal_merge`` under a threshold, for chunks [B, T, (H, W or N,) D] that follow on each other."""

    threshold: float
    reference: str = "previous"
    reduce: str = "mean"
    refresh: int = 0

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "first"):
            raise ValueError(f"expected reduce 'mean' or 'first', got {self.reduce!r}")

    def __call__(self, x: Tensor, state: State | None, begin: Tensor, closing: bool = False) -> tuple[Packed, State]:
        """The runs that this chunk closes (all of them if ``closing``), and what stays open.

        ``begin`` int64 [B] is the time of the first frame. The rows of a piece are those of the chunk, led by one frame
        that stands for the runs open before it.
        """
        videos, frames = x.shape[:2]
        h, w = (1, x.shape[2]) if x.dim() == 4 else x.shape[2:4]
        sites, rows = h * w, x.reshape(-1, x.shape[-1])
        chunk = Layout.uniform(videos, frames, h, w, device=x.device)
        state = self._blank(chunk, rows) if state is None else state
        keep, _, gate_rows, gate_weight, seen = ops.temporal_gate(
            rows.detach(), chunk.cu_seqlens, chunk.tokens_per_frame, chunk.sites, self.threshold,
            reference=self.reference, refresh=self.refresh,
            state_rows=state["rows"], state_weight=state["length"], state_step=state["seen"],
        )  # fmt: skip

        def led(first: Tensor, rest: Tensor) -> Tensor:
            """One frame [B·N, ...] ahead of the chunk's [B·T·N, ...]."""
            parts = first.unflatten(0, (videos, 1, sites)), rest.unflatten(0, (videos, frames, sites))
            return torch.cat(parts, 1).flatten(0, 2)

        layout = Layout.uniform(videos, frames + 1, h, w, device=x.device)
        whole = torch.arange(2, dtype=torch.int64, device=x.device) * layout.total
        index, _ = ops.compact(led(state["count"] > 0, keep), whole, layout.total)
        joined = runs(index, layout)
        members, offsets = ops.group(joined, layout.total)
        values = led(state["total"], rows.to(state["total"].dtype))
        if self.reduce == "mean":
            total, _ = ops.merge(values, members, offsets, reduce="sum")
        else:
            total = ops.pack(values, index)
        counts = led(state["count"], torch.ones_like(rows[:, 0], dtype=torch.float32))
        count, _ = ops.merge(counts[:, None], members, offsets, reduce="sum")
        times = (begin[:, None, None] + torch.arange(frames, device=x.device)[:, None]).expand(-1, -1, sites)
        head = led(state["head"], times.flatten())

        last = joined.unflatten(0, (videos, frames + 1, sites))[:, -1].flatten()  # the run open at each site
        open_ = torch.zeros(layout.total + 1, dtype=torch.bool, device=x.device)
        open_ = open_.index_fill(0, torch.where(last < 0, layout.total, last), not closing)[:-1]
        chosen, _ = ops.compact((index >= 0) & ~open_, whole, layout.total)
        packed = self._packed(layout, index, joined, chosen, total, count, head, x.dtype)
        at = torch.where(last >= 0, index[last.clamp(min=0)], -1)
        return packed, {
            "rows": gate_rows, "length": gate_weight, "seen": seen, "total": ops.pack(total, last),
            "count": ops.pack(count, last)[:, 0], "head": ops.pack(head[:, None], at)[:, 0],
        }  # fmt: skip

    def _packed(
        self, layout: Layout, index: Tensor, joined: Tensor, chosen: Tensor, total: Tensor, count: Tensor,
        head: Tensor, dtype: torch.dtype,
    ) -> Packed:  # fmt: skip
        """The chosen runs, in the order of where they begin, and which rows are in them."""
        weight, kept = ops.pack(count, chosen), chosen >= 0
        values = ops.pack(total, chosen)
        if self.reduce == "mean":
            values = values / weight.clamp(min=1).to(values.dtype)
        rows = torch.where(kept, index[chosen.clamp(min=0)], -1)
        place = layout.positions(rows)
        times = torch.where(kept, head[rows.clamp(min=0)], -1)
        slots = torch.arange(layout.total, dtype=torch.int64, device=rows.device)
        slot = torch.full_like(slots[:1], -1).expand(layout.total + 1).clone()
        slot = slot.scatter(0, torch.where(kept, chosen, layout.total), slots)[:-1]
        starts = torch.searchsorted(torch.where(kept, rows, layout.total), layout.cu_seqlens)
        return Packed(
            values.to(dtype), rows, starts, layout,
            positions=torch.cat([times[:, None], place[:, 1:]], 1), weight=weight[:, 0],
            assignment=torch.where(joined >= 0, slot[joined.clamp(min=0)], -1), is_merged=self.reduce == "mean",
        )  # fmt: skip

    def _blank(self, layout: Layout, rows: Tensor) -> State:
        zeros = rows.new_zeros(layout.sites, rows.shape[1], dtype=accumulator(rows.dtype))
        none = torch.zeros_like(zeros[:, 0], dtype=torch.float32)
        return {
            "rows": zeros, "length": none, "seen": torch.zeros_like(layout.tokens_per_frame), "total": zeros,
            "count": none, "head": torch.zeros_like(none, dtype=torch.int64),
        }  # fmt: skip
