"""merge: weighted means, sums and maxima of groups of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.ops import _check
from vtok.ops.pack import reference as gather

SCHEMA = (
    "merge(Tensor tokens, Tensor members, Tensor offsets, Tensor? weights=None, *, "
    'str reduce="mean") -> (Tensor values, Tensor weight)'
)


def merge(
    tokens: Tensor, members: Tensor, offsets: Tensor, weights: Tensor | None = None, *, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Reduce each group of rows to one row; ``group`` makes the lists from an assignment.

    Args:
        tokens: float32, float16, bfloat16 or float64, shape (S, D). Rows may be strided.
        members: int64, shape (M,), source rows in [-1, S), group after group; -1 is skipped, repeats allowed.
        offsets: int64, shape (K+1,), ascending from 0 to at most M: group g is
            ``members[offsets[g]:offsets[g + 1]]``. What lies beyond the last offset is not read.
        weights: float32 (float64 for float64 tokens), shape (S,), the size of each source row. None: all ones.
        reduce: "mean" (sum of w·x over sum of w), "sum" (sum of w·x) or "max" (per channel, weights ignored).

    Returns:
        values: the dtype of ``tokens``, shape (K, D). Zeros for an empty group, and for a mean whose weight is zero.
        weight: float32 (float64 for float64 tokens), shape (K,), the sum of w whatever ``reduce``: feed it as the
            ``weights`` of the next round and merging in rounds equals merging once.

    Raises:
        RuntimeError: wrong rank, shape, dtype, device or ``reduce``; on the CPU also offsets that do not ascend from
            0 to at most M, and listed members outside [-1, S). On other devices such members are skipped and such
            offsets clamped, for looking would cost a sync.

    The rule (size-weighted merging as in ToMe): acc starts at +0 in float32 and takes round(w·x) in list order, never
    contracted, then one division and one rounding to the dtype. A max keeps the first of equals; NaN propagates.

    Equivalent, where no member is -1 and none lies beyond the last offset, to stacking
    ``(w[m, None] * x[m]).sum(0) / w[m].sum()`` over ``m in members.tensor_split(offsets[1:-1])``.

    Moves (M + K)·D·itemsize + 8·(M + K) + 4·(M + K) bytes. Class E: bit-equal on every backend. Differentiable in
    ``tokens`` and ``weights``, in both outputs (a max passes its gradient to the first maximal member of a channel).
    Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.merge(tokens, members, offsets, weights, reduce=reduce)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(tokens: Tensor, members: Tensor, offsets: Tensor, weights: Tensor | None, reduce: str) -> None:
    _check.expect_dim("merge", "tokens", tokens, 2, "(S, D)")
    _check.expect_float("merge", "tokens", tokens)
    _check.expect_index("merge", "members", members, tokens, "(M,)")
    _check.expect_index("merge", "offsets", offsets, tokens, "(K+1,)")
    _check.expect(offsets.shape[0] >= 1, "merge", "offsets of shape (K+1,)", _check.shape_text(offsets))
    _check.expect(reduce in ("mean", "sum", "max"), "merge", "reduce to be mean, sum or max", reduce)
    if weights is not None:
        _check.expect_dim("merge", "weights", weights, 1, "(S,)")
        rows = tokens.shape[0]
        _check.expect(weights.shape[0] == rows, "merge", f"weights of shape (S,)=({rows},)", _check.shape_text(weights))
        _check.expect_dtype("merge", "weights", weights, accumulator(tokens.dtype))
        _check.expect_same_device("merge", "weights", weights, tokens)


def reference(
    tokens: Tensor, members: Tensor, offsets: Tensor, weights: Tensor | None = None, *, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    check(tokens, members, offsets, weights, reduce)
    rows, total = tokens.shape[0], members.shape[0]
    if tokens.device.type == "cpu":
        _check.expect_ascending("merge", "offsets", offsets, total, "M")
        _check.expect_all_in_range("merge", "members", members[: int(offsets[-1])], rows)
    offsets = offsets.clamp(0, total)

    def segments(x: Tensor, how: str, start: float) -> Tensor:  # each segment one by one, in list order
        return torch.segment_reduce(x, how, offsets=offsets, initial=start, unsafe=True)

    inside = (members >= 0) & (members < rows)
    listed = torch.where(inside, members, -1)
    x = gather(tokens, listed).to(accumulator(tokens.dtype))
    w = inside[:, None].to(x.dtype) if weights is None else gather(weights[:, None], listed)
    weight = segments(w, "sum", 0)
    if reduce == "max":
        some = segments(inside[:, None].to(x.dtype), "sum", 0) > 0
        values = torch.where(some, segments(x.where(inside[:, None], -torch.inf), "max", -torch.inf), 0)
    else:
        values = segments(x * w, "sum", 0)
        if reduce == "mean":
            values = torch.where(weight == 0, 0, values / weight)
    return values.to(tokens.dtype), weight[:, 0]


def fake(
    tokens: Tensor, members: Tensor, offsets: Tensor, weights: Tensor | None = None, *, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    check(tokens, members, offsets, weights, reduce)
    groups = offsets.shape[0] - 1
    values = tokens.new_empty(groups, tokens.shape[1])
    return values, tokens.new_empty(groups, dtype=accumulator(tokens.dtype))


def setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    tokens, members, offsets, weights = inputs
    values, weight = output
    ctx.rows, ctx.reduce = tokens.shape[0], keyword_only_inputs["reduce"]
    kept = (tokens, values) if ctx.reduce == "max" or weights is not None else (None, None)
    ctx.save_for_backward(members, offsets, weights, weight, *kept)


def backward(ctx, grad: Tensor, grad_weight: Tensor):
    members, offsets, weights, weight, tokens, values = ctx.saved_tensors
    place = torch.arange(members.shape[0], device=members.device)
    owner = torch.searchsorted(offsets, place, right=True) - 1  # the group that each place of the list belongs to
    inside = (members >= 0) & (members < ctx.rows) & (place < offsets[-1])
    owner, row = torch.where(inside, owner, -1), torch.where(inside, members, -1)
    places, starts = torch.ops.vtok.group(row, ctx.rows)  # the places that list each row
    owners = torch.ops.vtok.pack(owner[:, None], places)[:, 0].where(places >= 0, -1)

    def to_rows(groups: Tensor, scale: Tensor | None = None) -> Tensor:  # sums what its groups hold for each row
        return torch.ops.vtok.merge(groups, owners, starts, scale, reduce="sum")[0]

    if ctx.reduce == "max":
        first = first_maximal(tokens, values, offsets, row, owner)
        listed = torch.where(first, torch.ops.vtok.pack(grad, owner), 0)
        grad_tokens, _ = torch.ops.vtok.merge(listed, places, starts, reduce="sum")
        return grad_tokens, None, None, None if weights is None else to_rows(grad_weight[:, None])[:, 0]

    scale = torch.where(weight == 0, 0, 1 / weight) if ctx.reduce == "mean" else None
    if weights is None:
        return to_rows(grad, scale), None, None, None
    wide = grad.to(weight.dtype)
    per_row = to_rows(wide, scale)
    if ctx.reduce == "mean":
        grad_weight = grad_weight - scale * (wide * values).sum(1)
    grad_weights = (per_row * tokens).sum(1) + to_rows(grad_weight[:, None])[:, 0]
    return (per_row * weights[:, None]).to(grad.dtype), None, None, grad_weights


def first_maximal(tokens: Tensor, values: Tensor, offsets: Tensor, row: Tensor, owner: Tensor) -> Tensor:
    """Which place of the list each channel's maximum comes from: bool [M, D]."""
    x, y = torch.ops.vtok.pack(tokens, row), torch.ops.vtok.pack(values, owner)
    same = (owner >= 0)[:, None] & ((x == y) | (x.isnan() & y.isnan()))
    place = torch.arange(row.shape[0], device=row.device)
    rank = torch.where(same, -place[:, None].double(), -torch.inf)
    first, _ = torch.ops.vtok.merge(rank, place, offsets, reduce="max")
    return same & (rank == torch.ops.vtok.pack(first, owner))
