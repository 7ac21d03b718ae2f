"""motion_gate in Triton: a program walks a few patches side by side through all steps; their references lie in the
state that is returned."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from vtok.ops import _canonical, _patch, _rooms
from vtok.triton_kernels._patch import dense_pixels, patch_distance, sizes


@triton.jit
def copy_patches(
    source, target, source_strides, target_strides, left, rows, pw, ph, first, last, C, PATCHES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Frames [first, last) of a step; pointers and ``left`` are [PATCHES, 1], 0 columns are left of what stays."""
    lane = tl.arange(0, COLUMNS)[None, :]
    rows += tl.full((PATCHES, 1), 0, tl.int64)
    for i in range(C * (last - first) * ph):
        y, frame = i % ph, i // ph % (last - first) + first
        channel = (i // ph // (last - first)).to(tl.int64)
        from_ = channel * source_strides[0] + frame * source_strides[1] + y * source_strides[2]
        to = channel * target_strides[0] + frame * target_strides[1] + y * target_strides[2]
        for k in range(0, pw, COLUMNS):
            mask = (k + lane < left) & (k + lane < pw) & (y < rows)
            tl.store(target + to + k + lane, tl.load(source + from_ + k + lane, mask=mask), mask=mask)


@triton.jit
def motion_gate_kernel(
    frames, given, given_step, forced, next, next_step, keep, score, batch, frame, channel, row, given_batch,
    given_channel, given_frame, given_row, steps, C, H, W, h, w, blocks, tubelet, ph, pw, FRAMES, count, threshold_bits,
    refresh, EACH_FORCED: tl.constexpr, PREVIOUS: tl.constexpr, METRIC: tl.constexpr, FLOAT: tl.constexpr,
    ACC: tl.constexpr, PATCHES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    id = tl.program_id(0).to(tl.int64)
    px = id % blocks * PATCHES + tl.arange(0, PATCHES)  # [PATCHES]
    py, b = id // blocks % h, id // blocks // h
    threshold = tl.full((), threshold_bits, tl.int64).to(tl.float64, bitcast=True).to(FLOAT)
    corner, plane = py * ph * row + px * pw, tl.cast(H, tl.int64) * W
    x = frames + (b * batch + corner)[:, None]  # [PATCHES, 1]
    state = next + (b * C * tubelet * plane + py * ph * W + px * pw)[:, None]
    strides, state_strides = (channel, frame, row), (tubelet * plane, plane, tl.cast(W, tl.int64))
    left, rows = tl.where(px < w, W - px * pw, 0)[:, None], H - py * ph
    seen = tl.full((), 0, tl.int64)
    if given is not None:
        seen = tl.maximum(tl.load(given_step + b), 0)
        known = tl.where((seen > 0) | (steps == 0), left, 0)
        old = given + (b * given_batch + py * ph * given_row + px * pw)[:, None]
        given_strides = (given_channel, given_frame, given_row)
        copy_patches(old, state, given_strides, state_strides, known, rows, pw, ph, 0, tubelet, C, PATCHES, COLUMNS)
        tl.debug_barrier()
    last = tl.full((PATCHES,), -1, tl.int64)  # the step that each patch's reference is of
    for t in range(steps):
        place = ((b * steps + t) * h + py) * w + px
        number = seen + t
        now = x + (t * tubelet + tubelet - FRAMES) * frame
        known = tl.where(number > 0, left, 0)
        distance = patch_distance(now, state, strides, state_strides, known, rows, pw, ph, FRAMES, count, METRIC, FLOAT,
                                  ACC, PATCHES, COLUMNS)  # fmt: skip
        distance = tl.where(number == 0, float("inf"), distance)
        kept = (distance > threshold) | (number + px * 0 == 0)
        if refresh > 0:
            kept = kept | (number % refresh + px * 0 == 0)
        if forced is not None:
            kept = kept | (
                tl.load(forced + (place if EACH_FORCED else b * steps + t + px * 0), mask=px < w, other=0) != 0
            )
        tl.store(score + place, distance, mask=px < w)
        tl.store(keep + place, kept, mask=px < w)
        last = tl.where(kept | PREVIOUS, t, last)
        tl.debug_barrier()  # the reference has been read
        moved = tl.where((last == t)[:, None], left, 0)
        copy_patches(x + t * tubelet * frame, state, strides, state_strides, moved, rows, pw, ph, 0, FRAMES, C, PATCHES,
                     COLUMNS)  # fmt: skip
        tl.debug_barrier()
    if FRAMES < tubelet:  # the frames that are not compared follow once
        moved = tl.where((last >= 0)[:, None], left, 0)
        old = x + (tl.maximum(last, 0) * tubelet * frame)[:, None]
        copy_patches(old, state, strides, state_strides, moved, rows, pw, ph, FRAMES, tubelet, C, PATCHES, COLUMNS)
    tl.store(next_step + b, seen + steps, mask=(py == 0) & (id % blocks == 0))


def motion_gate(
    frames: torch.Tensor,
    patch: list[int],
    threshold: float,
    tubelet: int = 1,
    *,
    metric: str = "l1",
    span: str = "ends",
    reference: str = "last_kept",
    refresh: int = 0,
    pad: bool = False,
    forced: torch.Tensor | None = None,
    state_frames: torch.Tensor | None = None,
    state_step: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _rooms.ROOMS["motion_gate"].check(
        frames, patch, threshold, tubelet, metric, span, reference, refresh, pad, forced, state_frames, state_step
    )
    B, T, h, w = _patch.grid(frames, patch, tubelet)
    (_, _, C, H, W), (ph, pw) = frames.shape, patch
    keep = frames.new_empty(B, T, h, w, dtype=torch.bool)
    score = frames.new_empty(B, T, h, w, dtype=_canonical.accumulator(frames.dtype))
    state = (torch.empty_like if T else torch.zeros_like)(frames.new_empty(B, C, tubelet, H, W))
    step = frames.new_empty(B, dtype=torch.int64)
    if B:
        frames, compared, constants = (
            dense_pixels(frames),
            tubelet if span == "whole" else 1,
            sizes(frames.dtype, pw, 128),
        )
        given = None if state_frames is None else dense_pixels(state_frames)
        blocks = triton.cdiv(w, constants["PATCHES"])
        motion_gate_kernel[(blocks * h * B,)](
            frames, given, None if state_step is None else state_step.contiguous(),
            None if forced is None else forced.contiguous(), state, step, keep, score, *frames.stride()[:4],
            *(state if given is None else given).stride()[:4], T, C, H, W, h, w, blocks, tubelet, ph, pw, compared,
            C * compared * ph, struct.unpack("<q", struct.pack("<d", threshold))[0], refresh,
            EACH_FORCED=forced is not None and forced.dim() == 4, PREVIOUS=reference == "previous", METRIC=metric,
            **constants, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return keep, score, state, step
