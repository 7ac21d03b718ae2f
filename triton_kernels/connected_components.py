"""connected_components in Triton: every edge joined in a union-find, then every label followed to its root."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _rooms
from vtok.triton_kernels._union_find import join_roots, root_of

BLOCK = 128


@triton.jit
def join_kernel(source, target, label, edges, n, BLOCK: tl.constexpr):
    edge = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(source + edge, mask=edge < edges, other=-1)
    b = tl.load(target + edge, mask=edge < edges, other=-1)
    real = (a >= 0) & (a < n) & (b >= 0) & (b < n)
    join_roots(label, tl.where(real, a, 0), tl.where(real, b, 0), real)


@triton.jit
def flatten_kernel(label, n, BLOCK: tl.constexpr):
    node = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    root_of(label, node, node < n)


def connected_components(source: torch.Tensor, target: torch.Tensor, n: int) -> torch.Tensor:
    _rooms.ROOMS["connected_components"].check(source, target, n)
    label = torch.arange(n, dtype=torch.int64, device=source.device)
    edges = source.shape[0]
    if edges and n:
        join_kernel[(triton.cdiv(edges, BLOCK),)](
            source.contiguous(), target.contiguous(), label, edges, n, BLOCK=BLOCK
        )
        flatten_kernel[(triton.cdiv(n, BLOCK),)](label, n, BLOCK=BLOCK)
    return label
