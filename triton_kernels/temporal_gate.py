"""temporal_gate in Triton: a program walks a site through time. What a row is compared with is an earlier row of its
site, read again from the L2 cache, or lies in next_rows: the state's row, or the run's sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vtok.ops import _canonical, _rooms
from vtok.triton_kernels._canonical import LANES, SEGMENT, STEPS, cosine, div_rn, fold, sqrt_rn

SITES = 1  # of a program
NEVER = 1 << 62  # as a refresh: it falls on frame 0 alone, which is kept anyway


@triton.jit
def walk_of(site, cu_seqlens, tokens_per_frame, ends, state_step, rows, videos, sites, depth):
    """The rows of each site, first + t·stride for t < frames, whatever the layout in [0, rows), and the step before."""
    low = site * 0
    high = low + videos  # the video `videos` is none
    for _ in range(depth):
        middle = (low + high) // 2
        open_ = low < high
        after = tl.load(ends + middle, mask=open_, other=0) <= site
        low = tl.where(open_ & after, middle + 1, low)
        high = tl.where(open_ & (after == 0), middle, high)
    inside = (low < videos) & (site < sites)
    stride = tl.maximum(tl.load(tokens_per_frame + low, mask=inside, other=1), 1)
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + low, mask=inside, other=0), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + low + 1, mask=inside, other=0), 0), rows)
    place = site - tl.load(ends + low, mask=inside, other=0) + stride
    left = end - begin - place
    frames = tl.where(inside & (left > 0), (left - 1) // stride + 1, 0)
    step = site * 0
    if state_step is not None:
        step = tl.maximum(tl.load(state_step + low, mask=inside, other=0), 0)
    return begin + place, stride, frames, step


@triton.jit
def gate_kernel(
    tokens, cu_seqlens, tokens_per_frame, ends, limit, state_rows, state_weight, state_step,
    keep, similarity, next_rows, next_weight, rows, D, stride, videos, sites, depth, eps, refresh,
    REFERENCE: tl.constexpr, L2: tl.constexpr, ACC: tl.constexpr, SITES: tl.constexpr,
):  # fmt: skip
    site = tl.program_id(0).to(tl.int64) * SITES + tl.arange(0, SITES)  # [SITES]
    exists = site < sites
    first, step, frames, before = walk_of(
        site, cu_seqlens, tokens_per_frame, ends, state_step, rows, videos, sites, depth
    )
    lane = tl.arange(0, LANES)
    weight = tl.full((SITES,), 0, tl.float32)
    if state_step is not None:
        given = tl.load(state_weight + site, mask=exists & (before > 0), other=0)
        weight = tl.where(given > 0, given, 0)
    run = next_rows + (site * D)[:, None] + lane[None, :]  # [SITES, LANES]
    for i in range(0, D, LANES):
        mask = exists[:, None] & (lane < D - i)[None, :]
        value = tl.full((SITES, LANES), 0, ACC)
        if state_step is not None:
            old = state_rows + (site * D)[:, None] + lane[None, :] + i
            value = tl.load(old, mask=mask & (weight > 0)[:, None], other=0)
        tl.store(run + i, value, mask=mask)
    opener = site * 0 - 1  # the row to compare with, or -1: next_rows
    threshold = tl.load(limit)
    for t in range(tl.max(frames)):
        active = t < frames
        s = tl.where(active, first + t * step, 0)
        known = active & (weight > 0)
        row = tokens + (s * stride)[:, None] + lane[None, :]
        chosen = tokens + (tl.maximum(opener, 0) * stride)[:, None] + lane[None, :]
        tl.debug_barrier()  # next_rows is written
        dot = tl.full((SITES, LANES), 0, ACC)  # or |a - b|²
        norm_a = tl.full((SITES, LANES), 0, ACC)
        norm_b = tl.full((SITES, LANES), 0, ACC)
        for start in range(0, D, SEGMENT):
            dot_part = tl.full((SITES, LANES), 0, ACC)
            a_part = tl.full((SITES, LANES), 0, ACC)
            b_part = tl.full((SITES, LANES), 0, ACC)
            for at in tl.static_range(STEPS):
                i = start + at * LANES
                mask = known[:, None] & (lane < D - i)[None, :]
                b = tl.load(row + i, mask=mask, other=0).to(ACC)
                a = tl.load(run + i, mask=mask & (opener < 0)[:, None], other=0)
                if REFERENCE == "run_mean":
                    a = div_rn(a, tl.where(known, weight, 1).to(ACC)[:, None])
                else:
                    other = tl.load(chosen + i, mask=mask & (opener >= 0)[:, None], other=0).to(ACC)
                    a = tl.where((opener < 0)[:, None], a, other)
                if L2:
                    dot_part += (b - a) * (b - a)
                else:
                    dot_part += a * b
                    a_part += a * a
                    b_part += b * b
            dot += dot_part
            norm_a += a_part
            norm_b += b_part
        if L2:
            score = -sqrt_rn(fold(dot, SITES))
        else:
            score = cosine(fold(dot, SITES), fold(norm_a, SITES), fold(norm_b, SITES), tl.cast(eps, ACC))
        joins = known & (score > threshold) & ((before + t) % refresh != 0)
        tl.store(similarity + s, tl.where(known, score, float("-inf")), mask=active)
        tl.store(keep + s, (joins == 0).to(tl.uint8), mask=active)
        if REFERENCE == "run_mean":
            tl.debug_barrier()  # next_rows is read
            for i in range(0, D, LANES):
                mask = active[:, None] & (lane < D - i)[None, :]
                b = tl.load(row + i, mask=mask, other=0).to(ACC)
                a = tl.load(run + i, mask=mask & joins[:, None], other=0)
                tl.store(run + i, tl.where(joins[:, None], a + b, b), mask=mask)
        else:
            opener = tl.where(active & ((joins == 0) | (REFERENCE == "previous")), s, opener)
        weight = tl.where(active, tl.where(joins, weight, 0) + 1, weight)
    if REFERENCE != "run_mean":
        last = tokens + (tl.maximum(opener, 0) * stride)[:, None] + lane[None, :]
        for i in range(0, D, LANES):
            mask = (exists & (opener >= 0))[:, None] & (lane < D - i)[None, :]
            tl.store(run + i, tl.load(last + i, mask=mask, other=0).to(ACC), mask=mask)
    tl.store(next_weight + site, weight, mask=exists)


def temporal_gate(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tokens_per_frame: torch.Tensor,
    sites: int,
    threshold: float,
    *,
    reference: str = "last_kept",
    metric: str = "cosine",
    eps: float = 1e-8,
    refresh: int = 0,
    state_rows: torch.Tensor | None = None,
    state_weight: torch.Tensor | None = None,
    state_step: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    _rooms.ROOMS["temporal_gate"].check(
        tokens, cu_seqlens, tokens_per_frame, sites, threshold, reference, metric, eps, refresh,
        state_rows, state_weight, state_step,
    )  # fmt: skip
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    (rows, D), videos, dtype = tokens.shape, tokens_per_frame.shape[0], _canonical.accumulator(tokens.dtype)
    cu_seqlens, tokens_per_frame = cu_seqlens.contiguous(), tokens_per_frame.contiguous()
    state = [x if x is None else x.contiguous() for x in (state_rows, state_weight, state_step)]
    frame, bounds = tokens_per_frame.clamp(min=0), cu_seqlens.clamp(0, rows)
    steps = torch.where(frame > 0, (bounds.diff().clamp(min=0) + frame - 1) // frame.clamp(min=1), 0)
    keep = torch.arange(rows, device=tokens.device) < bounds[-1]  # as if no row had a site; the kernel knows better
    similarity = tokens.new_full((rows,), float("-inf"), dtype=dtype)
    next_rows, next_weight = tokens.new_empty(sites, D, dtype=dtype), tokens.new_empty(sites, dtype=torch.float32)
    if sites:
        limit = torch.full((1,), threshold, dtype=torch.float64, device=tokens.device).to(dtype)  # scalars are float32
        gate_kernel[(triton.cdiv(sites, SITES),)](
            tokens, cu_seqlens, tokens_per_frame, frame.clamp(max=sites).cumsum(0), limit, *state,
            keep.view(torch.uint8), similarity, next_rows, next_weight, rows, D, tokens.stride(0), videos, sites,
            videos.bit_length(), eps, refresh or NEVER, REFERENCE=reference, L2=metric == "l2",
            ACC=tl.float64 if dtype == torch.float64 else tl.float32, SITES=SITES, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return keep, similarity, next_rows, next_weight, steps if state_step is None else steps + state_step.clamp(min=0)
