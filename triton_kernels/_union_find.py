"""Union-find that all programs of a grid share, without a lock: csrc/common/union_find.cuh says why it is right. Labels
start as label[s] = s, and label[s] <= s stays true."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def any_of(x):
    return tl.max(x.to(tl.int32), 0) != 0


@triton.jit
def join_roots(label, a, b, active):
    """Joins the nodes a and b where active; tensors of one dimension. Each round climbs, or hangs what are roots."""
    while any_of(active):
        up_a = tl.load(label + a, mask=active, other=0, volatile=True)
        up_b = tl.load(label + b, mask=active, other=0, volatile=True)
        top_a = tl.load(label + up_a, mask=active, other=0, volatile=True)
        top_b = tl.load(label + up_b, mask=active, other=0, volatile=True)
        tl.store(label + a, top_a, mask=active & (top_a != up_a))
        tl.store(label + b, top_b, mask=active & (top_b != up_b))
        active = active & (top_a != top_b)
        roots = active & (top_a == a) & (top_b == b)
        high, low = tl.maximum(top_a, top_b), tl.minimum(top_a, top_b)
        was = tl.atomic_min(label + high, low, mask=roots)
        active = active & ((roots == 0) | (was != high))
        a, b = tl.where(roots, low, top_a), tl.where(roots, was, top_b)


@triton.jit
def root_of(label, s, active):
    """The roots of nodes s once all joins are done; on the way they write their own labels alone."""
    x = s
    above = tl.load(label + x, mask=active, other=0, volatile=True)
    climbs = active & (above != x)
    while any_of(climbs):
        x = tl.where(climbs, above, x)
        above = tl.load(label + x, mask=climbs, other=0, volatile=True)
        tl.store(label + s, above, mask=climbs)
        climbs = climbs & (above != x)
    return x
