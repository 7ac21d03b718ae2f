"""temporal_gate: which tokens open a new run in time at their site, and which join the open one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtok.ops import _canonical, _check

SCHEMA = (
    "temporal_gate(Tensor tokens, Tensor cu_seqlens, Tensor tokens_per_frame, SymInt sites, float threshold, *, "
    'str reference="last_kept", str metric="cosine", float eps=1e-08, int refresh=0, Tensor? state_rows=None, '
    "Tensor? state_weight=None, Tensor? state_step=None) "
    "-> (Tensor keep, Tensor similarity, Tensor state_rows, Tensor state_weight, Tensor state_step)"
)


def temporal_gate(
    tokens: Tensor,
    cu_seqlens: Tensor,
    tokens_per_frame: Tensor,
    sites: int,
    threshold: float,
    *,
    reference: str = "last_kept",
    metric: str = "cosine",
    eps: float = 1e-8,
    refresh: int = 0,
    state_rows: Tensor | None = None,
    state_weight: Tensor | None = None,
    state_step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk each site through time: a token like enough to its site's open run joins it, any other opens a new one.

    Args:
        tokens: float32, float16, bfloat16 or float64, shape (S, D): V videos packed in (video, t, h, w) order. Rows may
            be strided; columns that are not dense are copied first.
        cu_seqlens: int64, shape (V+1,), video v is rows [cu_seqlens[v], cu_seqlens[v+1]); ascending from 0, at most S.
        tokens_per_frame: int64, shape (V,), the sites of each video, rows of one frame; 0 or less: it has none. A last
            frame that is incomplete covers its first sites.
        sites: the sum of tokens_per_frame (0 for less), known to the host: rows of the state.
        threshold: a token joins where its similarity is greater, strictly, compared in the similarity's dtype; finite
            or infinite. NaN never joins.
        reference: what a token is compared with. "previous": the row one frame earlier; "last_kept": the row that
            opened the run; "run_mean": the mean of the run's rows, their sum in time order over their number.
        metric, eps: as in :func:`temporal_similarity`: "cosine", or "l2", the distance -|a - b|.
        refresh: R > 0 keeps every row whose frame number, counted from the start of the stream, is a multiple of R.
        state_rows, state_weight, state_step: what the call before returned for the same videos, all three or none. A
            video whose state_step is 0 starts anew. Chunks of whole frames, of any length, give what one piece gives.

    Returns:
        keep: bool, shape (S,). Rows that open a run: also a site's first, and all of a video that has no sites; not
            rows outside every video.
        similarity: float32 (float64 for float64 tokens), shape (S,). -inf where there is nothing to compare with.
        state_rows: the similarity's dtype, shape (sites, D), for the sites of all videos back to back: the row before,
            the row that opened the run, or the sum of the run's rows; zeros where no row has come.
        state_weight: float32, shape (sites,), rows in the open run so far; exact up to 2^24.
        state_step: int64, shape (V,), frames of each video so far; an incomplete one counts.

    Raises:
        RuntimeError: wrong rank, shape, dtype or device, another reference or metric, NaN as threshold, a refresh or
            sites below 0, a state in part; on the CPU also boundaries that do not ascend and ``sites`` that are not the
            sum. On other devices looking would cost a sync: rows of such boundaries have unspecified outputs, sites
            that are too many stay empty, and the rows of those that are missing are all kept.

    Equivalent, for "previous" and one video's frames ``x`` = (T, n, D) in float32, up to the order of the sums, to
    ``torch.nn.functional.cosine_similarity(x[1:], x[:-1], dim=-1) <= threshold`` after a frame that is kept; the other
    references need a loop over the frames. The rule of TimeChat-Online's DTD ("previous") and of FrameFusion's and
    Mavors' runs. The order of the sums is fixed (vtok/ops/_canonical.py).

    Moves S·D·itemsize + 5·S + (4 or, with a state, 8)·sites·D bytes. Class E. Not differentiable: the similarity has no
    gradient, :func:`temporal_similarity` has. Capturable in a CUDA graph; never syncs.
    """
    return torch.ops.vtok.temporal_gate(
        tokens, cu_seqlens, tokens_per_frame, sites, threshold, reference=reference, metric=metric, eps=eps,
        refresh=refresh, state_rows=state_rows, state_weight=state_weight, state_step=state_step,
    )  # fmt: skip


def check(
    tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, sites: int, threshold: float,
    reference: str, metric: str, eps: float, refresh: int,
    state_rows: Tensor | None, state_weight: Tensor | None, state_step: Tensor | None,
) -> None:  # fmt: skip
    op = "temporal_gate"
    _check.expect_dim(op, "tokens", tokens, 2, "(S, D)")
    _check.expect_float(op, "tokens", tokens)
    _check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, tokens)
    videos, D = cu_seqlens.shape[0] - 1, tokens.shape[1]

    def expect_shape(name: str, tensor: Tensor, spelled: str, shape: tuple) -> None:
        fits = all(a == b for a, b in zip(tensor.shape, shape, strict=True))
        _check.expect(fits, op, f"{name} of shape {spelled}={shape}", _check.shape_text(tensor))

    _check.expect_index(op, "tokens_per_frame", tokens_per_frame, tokens, "(V,)")
    expect_shape("tokens_per_frame", tokens_per_frame, "(V,)", (videos,))
    _check.expect(sites >= 0, op, "sites >= 0", sites)
    _check.expect(not math.isnan(threshold), op, "threshold to be a number", "nan")
    known = reference in ("previous", "last_kept", "run_mean")
    _check.expect(known, op, 'reference of "previous", "last_kept" or "run_mean"', f'"{reference}"')
    _check.expect(metric in ("cosine", "l2"), op, 'metric of "cosine" or "l2"', f'"{metric}"')
    _check.expect(math.isfinite(eps) and eps >= 0, op, "eps finite and >= 0", f"{eps:g}")
    _check.expect(refresh >= 0, op, "refresh >= 0", refresh)
    given = sum(state is not None for state in (state_rows, state_weight, state_step))
    _check.expect(given in (0, 3), op, "state_rows, state_weight and state_step, or none", f"{given} of them")
    if state_rows is None or state_weight is None or state_step is None:
        return
    _check.expect_dim(op, "state_rows", state_rows, 2, "(sites, D)")
    expect_shape("state_rows", state_rows, "(sites, D)", (sites, D))
    _check.expect_dtype(op, "state_rows", state_rows, _canonical.accumulator(tokens.dtype))
    _check.expect_same_device(op, "state_rows", state_rows, tokens)
    _check.expect_dim(op, "state_weight", state_weight, 1, "(sites,)")
    expect_shape("state_weight", state_weight, "(sites,)", (sites,))
    _check.expect_dtype(op, "state_weight", state_weight, torch.float32)
    _check.expect_same_device(op, "state_weight", state_weight, tokens)
    _check.expect_index(op, "state_step", state_step, tokens, "(V,)")
    expect_shape("state_step", state_step, "(V,)", (videos,))


def reference(
    tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, sites: int, threshold: float, *,
    reference: str = "last_kept", metric: str = "cosine", eps: float = 1e-8, refresh: int = 0,
    state_rows: Tensor | None = None, state_weight: Tensor | None = None, state_step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check(
        tokens, cu_seqlens, tokens_per_frame, sites, threshold, reference, metric, eps, refresh,
        state_rows, state_weight, state_step,
    )  # fmt: skip
    (rows, D), n = tokens.shape, tokens_per_frame.clamp(min=0)
    _check.expect_ascending("temporal_gate", "cu_seqlens", cu_seqlens, rows, "S")
    if tokens.device.type == "cpu":
        total = int(n.sum())
        _check.expect(sites == total, "temporal_gate", f"sites equal to the sum of tokens_per_frame={total}", sites)

    # The rows of a site: first + t·stride for t < frames.
    bounds = cu_seqlens.clamp(0, rows)
    count = bounds.diff()
    steps = torch.where(n > 0, -(-count // n.clamp(min=1)), 0).clamp(min=0)
    site, ends = torch.arange(sites, device=n.device), n.cumsum(0)
    video = torch.searchsorted(ends, site, right=True)  # V: beyond the last video

    def of_site(per_video: Tensor) -> Tensor:
        return torch.cat([per_video, per_video.new_zeros(1)])[video]

    place, stride = site - of_site(ends - n), of_site(n)
    first, frames = of_site(bounds[:-1]) + place, -((place - of_site(count)) // stride.clamp(min=1))
    frames = torch.where(video < len(n), frames, 0).clamp(min=0)

    step = n.new_zeros(len(n)) if state_step is None else state_step.clamp(min=0)
    run, weight = tokens.new_zeros(sites, D, dtype=_canonical.accumulator(tokens.dtype)), n.new_zeros(sites).float()
    if state_rows is not None and state_weight is not None:
        weight = torch.where((of_site(step) > 0) & (state_weight > 0), state_weight, 0)
        run = torch.where(weight[:, None] > 0, state_rows, 0)

    row = torch.arange(rows + 1, device=n.device)  # the last one takes what is no row
    keep, similarity = row < bounds[-1], run.new_full((rows + 1,), -math.inf)
    limit = torch.tensor(threshold, dtype=torch.float64).to(run.dtype)
    for t in range(int(frames.max()) if sites else 0):  # waits for the device, which a loop in the kernels does not
        active, known = t < frames, weight > 0
        row = torch.where(active, first + t * stride, 0)
        x = _canonical.widen(tokens[row])
        score = likeness(run / weight[:, None] if reference == "run_mean" else run, x, metric, eps)
        joins = known & (score > limit)
        if refresh:
            joins &= (of_site(step) + t) % refresh != 0
        slot = torch.where(active, row, rows)
        keep[slot], similarity[slot] = ~joins, score.masked_fill(~known, -math.inf)
        joined = {"previous": x, "last_kept": run, "run_mean": run + x}[reference]
        run = torch.where(active[:, None], torch.where(joins[:, None], joined, x), run)
        weight = torch.where(active, torch.where(joins, weight, 0) + 1, weight)
    return keep[:rows].clone(), similarity[:rows].clone(), run, weight, step + steps


def likeness(a: Tensor, b: Tensor, metric: str, eps: float) -> Tensor:
    if metric == "l2":
        return -_canonical.sqrt(_canonical.dot(b - a, b - a))
    return _canonical.cosine(_canonical.dot(a, b), _canonical.dot(a, a), _canonical.dot(b, b), eps)


def fake(
    tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, sites: int, threshold: float, *,
    reference: str = "last_kept", metric: str = "cosine", eps: float = 1e-8, refresh: int = 0,
    state_rows: Tensor | None = None, state_weight: Tensor | None = None, state_step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check(
        tokens, cu_seqlens, tokens_per_frame, sites, threshold, reference, metric, eps, refresh,
        state_rows, state_weight, state_step,
    )  # fmt: skip
    (rows, D), dtype = tokens.shape, _canonical.accumulator(tokens.dtype)
    return (
        tokens.new_empty(rows, dtype=torch.bool), tokens.new_empty(rows, dtype=dtype),
        tokens.new_empty(sites, D, dtype=dtype), tokens.new_empty(sites, dtype=torch.float32),
        torch.empty_like(tokens_per_frame, memory_format=torch.contiguous_format),
    )  # fmt: skip
