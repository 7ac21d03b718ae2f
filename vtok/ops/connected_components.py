"""connected_components: the lowest node that each node of a graph is linked with."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.ops import _check

SCHEMA = "connected_components(Tensor source, Tensor target, SymInt n) -> Tensor"


def connected_components(source: Tensor, target: Tensor, n: int) -> Tensor:
    """Label each of n nodes with the lowest node of its component.

    Args:
        source, target: int64, shape (E,), the two ends of each edge, in any order; edges may repeat. An edge with an
            end outside [0, n) is none: -1 marks what is no edge.
        n: number of nodes.

    Returns:
        label: int64, shape (n,). The lowest node that a path of edges leads to from each node: itself for the lowest,
            and for a node without edges.

    Raises:
        RuntimeError: wrong rank, dtype, device or shape, n below 0.

    The true components, however long the paths are: STTM's and LLaVA-Scissor's merges want them, whose own searches
    stop early or look at some nodes alone. It also finds the root of each node of a forest, where each edge leads from
    a node to a lower one.

    Equivalent to ``label = torch.arange(n)``, then ``for _ in range(n): low = torch.minimum(label[source],
    label[target]); label = label.scatter_reduce(0, torch.cat([source, target]), torch.cat([low, low]), "amin")``.

    Moves 16·E + 8·n bytes, and more in random reads. Class E. Not differentiable. Capturable in a CUDA graph; never
    syncs.
    """
    return torch.ops.vtok.connected_components(source, target, n)


def check(source: Tensor, target: Tensor, n: int) -> None:
    op = "connected_components"
    _check.expect_dim(op, "source", source, 1, "(E,)")
    _check.expect_dtype(op, "source", source, torch.int64)
    _check.expect_index(op, "target", target, source, "(E,)")
    shape = f"target of shape (E,)=({source.shape[0]},)"
    _check.expect(target.shape[0] == source.shape[0], op, shape, _check.shape_text(target))
    _check.expect(n >= 0, op, "n >= 0", n)


def reference(source: Tensor, target: Tensor, n: int) -> Tensor:
    check(source, target, n)
    real = (source >= 0) & (source < n) & (target >= 0) & (target < n)
    ends = torch.stack([source, target])[:, real]
    label = torch.arange(n, device=source.device)
    while True:
        low = label[ends].amin(0).expand_as(ends)
        hooked = label.scatter_reduce(0, label[ends].flatten(), low.flatten(), "amin")  # roots onto lower labels
        hooked = hooked[hooked]
        if torch.equal(hooked, label):
            return label
        label = hooked


def fake(source: Tensor, target: Tensor, n: int) -> Tensor:
    check(source, target, n)
    return source.new_empty(n)
