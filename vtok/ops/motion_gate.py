"""motion_gate: which patches moved since they were last kept, step by step, with the state between chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtok.ops import _canonical, _check, _patch

SCHEMA = (
    "motion_gate(Tensor frames, int[] patch, float threshold, int tubelet=1, *, "
    'str metric="l1", str span="ends", str reference="last_kept", int refresh=0, bool pad=False, '
    "Tensor? forced=None, Tensor? state_frames=None, Tensor? state_step=None) "
    "-> (Tensor keep, Tensor score, Tensor state_frames, Tensor state_step)"
)


def motion_gate(
    frames: Tensor,
    patch: list[int],
    threshold: float,
    tubelet: int = 1,
    *,
    metric: str = "l1",
    span: str = "ends",
    reference: str = "last_kept",
    refresh: int = 0,
    pad: bool = False,
    forced: Tensor | None = None,
    state_frames: Tensor | None = None,
    state_step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the patches whose distance from their reference exceeds a threshold, one step after another.

    Args:
        frames, patch, tubelet, metric, span, pad: as ``patch_motion`` takes them, shape (B, T, C, H, W).
        threshold: finite, >= 0, in the units of the metric and rounded to float32 (unless frames are float64). A patch
            is kept where its score is greater.
        reference: what a patch is compared with. "last_kept": its pixels at the step at which it was last kept, so that
            a slow drift adds up until it passes. "previous": those of the step before, which never catches a drift.
        refresh: every step whose number, counted from the start of the stream, is a multiple is kept entirely; 0: none.
        forced: bool, shape (B, T') or (B, T', h, w), steps or patches that are kept whatever they score.
        state_frames, state_step: what the call on the chunk before returned; both or none. A row whose step is 0 (or
            less) begins anew, whatever its frames.

    Returns:
        keep: bool, shape (B, T', h, w).
        score: float32 (float64 for float64 frames), shape (B, T', h, w), the raw distance, of kept patches too. The
            first step of a stream scores +inf and is kept entirely. NaN never passes, and a patch whose reference has
            NaN scores NaN until it is refreshed or forced.
        state_frames: the dtype of ``frames``, shape (B, C, tubelet, H, W), each patch's reference after the last step.
        state_step: int64, shape (B,), steps seen so far. Chunks of any lengths, 0 too, with the state passed on give
            what the whole stream gives, bit for bit.

    Raises:
        RuntimeError: whatever ``patch_motion`` raises; a threshold or refresh below 0, another reference; a forced or a
            state of another shape, dtype or device; one half of a state.

    Equivalent to a loop over steps: ``score = distance(x[t], r)``, ``keep = (score > threshold) | forced[t] |
    (step % refresh == 0)``, ``r = torch.where(keep of each pixel, x[t], r)``. The rules are GRT's (released code).

    Moves the frames once, and about 2·B·C·tubelet·H·W values of state. Class E. Not differentiable. Capturable in a
    CUDA graph; never syncs.
    """
    return torch.ops.vtok.motion_gate(
        frames, patch, threshold, tubelet, metric=metric, span=span, reference=reference, refresh=refresh, pad=pad,
        forced=forced, state_frames=state_frames, state_step=state_step,
    )  # fmt: skip


def check(
    frames: Tensor, patch: list[int], threshold: float, tubelet: int, metric: str, span: str, compare: str,
    refresh: int, pad: bool, forced: Tensor | None, state_frames: Tensor | None, state_step: Tensor | None,
) -> None:  # fmt: skip
    op = "motion_gate"
    _patch.check(op, frames, patch, tubelet, metric, span, pad)
    _check.expect(math.isfinite(threshold) and threshold >= 0, op, "threshold finite and >= 0", f"{threshold:g}")
    known = compare in ("previous", "last_kept")
    _check.expect(known, op, 'reference of "previous" or "last_kept"', f'"{compare}"')
    _check.expect(refresh >= 0, op, "refresh >= 0", refresh)
    B, T, h, w = _patch.grid(frames, patch, tubelet)
    if forced is not None:
        _check.expect_dtype(op, "forced", forced, torch.bool)
        shapes = f"forced of shape (B, T')=({B}, {T}) or (B, T', h, w)=({B}, {T}, {h}, {w})"
        _check.expect(tuple(forced.shape) in ((B, T), (B, T, h, w)), op, shapes, _check.shape_text(forced))
        _check.expect_same_device(op, "forced", forced, frames)
    both = (state_frames is None) == (state_step is None)
    _check.expect(both, op, "state_frames and state_step together", "one of them")
    if state_frames is not None and state_step is not None:
        _check.expect_dtype(op, "state_frames", state_frames, frames.dtype)
        shape = (B, frames.shape[2], tubelet, *frames.shape[3:])
        text = f"state_frames of shape (B, C, tubelet, H, W)={shape}"
        _check.expect(tuple(state_frames.shape) == shape, op, text, _check.shape_text(state_frames))
        _check.expect_same_device(op, "state_frames", state_frames, frames)
        _check.expect_index(op, "state_step", state_step, frames, "(B,)")
        length = f"state_step of shape (B,)=({B},)"
        _check.expect(state_step.shape[0] == B, op, length, _check.shape_text(state_step))


def reference(
    frames: Tensor,
    patch: list[int],
    threshold: float,
    tubelet: int = 1,
    *,
    metric: str = "l1",
    span: str = "ends",
    reference: str = "last_kept",
    refresh: int = 0,
    pad: bool = False,
    forced: Tensor | None = None,
    state_frames: Tensor | None = None,
    state_step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(frames, patch, threshold, tubelet, metric, span, reference, refresh, pad, forced, state_frames, state_step)
    B, T, h, w = _patch.grid(frames, patch, tubelet)
    _, _, C, H, W = frames.shape
    kept = frames.new_zeros(B, C, tubelet, H, W) if state_frames is None else state_frames.clone()
    step = frames.new_zeros(B, dtype=torch.int64) if state_step is None else state_step.clamp(min=0)
    keep = frames.new_empty(B, T, h, w, dtype=torch.bool)
    score = frames.new_empty(B, T, h, w, dtype=_canonical.accumulator(frames.dtype))
    for t, x in enumerate(_patch.steps(frames, tubelet).unbind(1)):
        number = (step + t)[:, None, None]
        distance = _patch.distance(*_patch.compared(x, kept, span), patch, metric)
        score[:, t] = torch.where(number == 0, math.inf, distance)
        whole = number % refresh == 0 if refresh else number == 0
        if forced is not None:
            whole = whole | (forced[:, t] if forced.dim() == 4 else forced[:, t, None, None])
        keep[:, t] = (score[:, t] > threshold) | whole | (number == 0)
        moved = _patch.pixels(keep[:, t], patch, H, W)[:, None, None]
        kept = torch.where(moved, x, kept) if reference == "last_kept" else x
    return keep, score, kept.contiguous(), step + T


def fake(
    frames: Tensor,
    patch: list[int],
    threshold: float,
    tubelet: int = 1,
    *,
    metric: str = "l1",
    span: str = "ends",
    reference: str = "last_kept",
    refresh: int = 0,
    pad: bool = False,
    forced: Tensor | None = None,
    state_frames: Tensor | None = None,
    state_step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(frames, patch, threshold, tubelet, metric, span, reference, refresh, pad, forced, state_frames, state_step)
    B, T, h, w = _patch.grid(frames, patch, tubelet)
    keep = frames.new_empty(B, T, h, w, dtype=torch.bool)
    score = frames.new_empty(B, T, h, w, dtype=_canonical.accumulator(frames.dtype))
    state = frames.new_empty(B, frames.shape[2], tubelet, *frames.shape[3:])
    return keep, score, state, frames.new_empty(B, dtype=torch.int64)
