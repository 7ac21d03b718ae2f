"""grt, gated residual tokenization: patches that moved since they were last kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtok import ops
from vtok.methods import Gated, register


@register("grt", kind="gate")
def grt(
    frames: Tensor,
    patch: tuple[int, int],
    tubelet: int,
    threshold: float | None,
    state: Any,
    *,
    metric: str = "l2",
    reference: str = "last_kept",
    refresh: int = 0,
    forced: Tensor | None = None,
    search: int = 0,
    bias: float = 0.0,
) -> Gated:
    """Keep a patch whose pixels differ from their reference by more than the threshold; the first step whole.

    Args:
        metric: "l2" or "ssim", GRT's two, or "l1" and "mse", as in ``vtok.ops.patch_motion``.
        reference: "last_kept", the pixels of the step at which the patch was last kept (the Qwen2.5-VL and the later
            LLaVA release), so that slow drift is caught; or "previous", the step before (the first LLaVA release).
        refresh: every so many steps one is kept whole; 0 is never.
        forced: bool [B, T'] or [B, T', h, w], kept whatever it scores: a codec's key frames.
        search: compare each patch with the block of the step before that it is most like, of all up to so many pixels
            away (``vtok.ops.motion_search``): what only moved is dropped, and ``Packed.vectors`` says where it came
            from. Under a threshold it goes with reference "previous", and like that never catches a drift.
        bias: of a search, what another block must gain over the patch's own place, in the units of the metric.

    Under a budget the reference is the previous step, for what was kept last follows from a threshold alone; forced
    and refreshed steps come first.

    Source: the released gates of Gated Residual Tokenization. They compare normalised pixels in the model's dtype and
    compute embeddings for the kept patches but carry the others on, so that nothing gets shorter; here the kept ones
    are packed. Distances add up in float32; the LLaVA releases take "l2" in the model's dtype. Scores are distances;
    the release divides them by the largest of their frame, see ``relative``. There a negative threshold means to keep
    everything; here it is an error.
    """
    check(frames, patch, tubelet, reference, refresh, forced)
    if search:
        return compensated(frames, patch, tubelet, threshold, state, metric, reference, refresh, forced, search, bias)
    if threshold is None:
        score = ops.patch_motion(frames, list(patch), tubelet, metric=metric, span="whole")
        return Gated(first_of_all(score, refresh, forced))
    keep, score, *state = ops.motion_gate(
        frames, list(patch), threshold, tubelet, metric=metric, span="whole", reference=reference, refresh=refresh,
        forced=forced, state_frames=state and state[0], state_step=state and state[1],
    )  # fmt: skip
    return Gated(score, keep, state)


def compensated(
    frames: Tensor, patch: tuple[int, int], tubelet: int, threshold: float | None, state: Any, metric: str,
    reference: str, refresh: int, forced: Tensor | None, search: int, bias: float,
) -> Gated:  # fmt: skip
    """``grt`` with a search; its state is the last step and the number of steps seen."""
    if threshold is not None and reference != "previous":
        raise ValueError(f'expected reference "previous" with a search under a threshold, got {reference!r}')
    if threshold is not None and not 0 <= threshold < math.inf:
        raise ValueError(f"expected threshold finite and >= 0, got {threshold:g}")
    videos, count = frames.shape[0], frames.shape[1] // tubelet
    before, seen = state or (frames[:, :0], frames.new_zeros(videos, dtype=torch.int64))
    frames = torch.cat([before, frames], 1) if before.shape[1] else frames
    score, vectors = ops.motion_search(frames, list(patch), search, tubelet, metric=metric, span="whole", bias=bias)
    first = score.shape[1] - count
    opens = (seen[:, None] + torch.arange(count, device=frames.device) == 0)[:, :, None, None]
    score, vectors = score[:, first:].masked_fill(opens, math.inf), vectors[:, first:].masked_fill(opens[..., None], 0)
    ranked = first_of_all(score, refresh, forced, seen)
    if threshold is None:
        return Gated(ranked, vectors=vectors)
    after = frames[:, -tubelet:].clone(memory_format=torch.contiguous_format)
    keep = (score > threshold) | (ranked == math.inf)  # also of a threshold that is +inf in float32
    return Gated(score, keep, [after, seen + count], vectors)


def check(
    frames: Tensor, patch: tuple[int, int], tubelet: int, reference: str, refresh: int, forced: Tensor | None
) -> None:
    """What ``motion_gate`` would refuse, also where another op runs."""
    if reference not in ("previous", "last_kept"):
        raise ValueError(f"method 'grt': expected reference 'previous' or 'last_kept', got {reference!r}")
    if refresh < 0:
        raise ValueError(f"method 'grt': expected refresh of at least 0, got {refresh}")
    if forced is None:
        return
    videos, count, _, height, width = frames.shape
    steps = (videos, count // tubelet)
    sites = (*steps, height // patch[0], width // patch[1])
    if not isinstance(forced, Tensor) or forced.dtype != torch.bool or forced.shape not in (steps, sites):
        got = f"{forced.dtype} {tuple(forced.shape)}" if isinstance(forced, Tensor) else type(forced).__name__
        raise ValueError(f"method 'grt': expected forced as bool {steps} or {sites}, got {got}")


def first_of_all(score: Tensor, refresh: int, forced: Tensor | None, seen: Tensor | None = None) -> Tensor:
    """+inf where a step is refreshed or forced; ``seen`` int64 [B] came before the first."""
    if refresh:
        steps = torch.arange(score.shape[1], device=score.device)
        steps = (steps if seen is None else seen[:, None] + steps) % refresh == 0
        score = score.masked_fill(steps[..., None, None], math.inf)
    if forced is not None:
        score = score.masked_fill(forced if forced.dim() == 4 else forced[:, :, None, None], math.inf)
    return score


def relative(score: Tensor) -> Tensor:
    """The release's scores [B, T', h, w]: each distance over the largest of its step; 1 in a first step.

    Divided by 1e-12 at least, as the LLaVA releases do; the Qwen2.5-VL release says 1e-6.
    """
    most = score.amax((2, 3), keepdim=True)
    return torch.where(most.isinf(), 1, score / most.clamp(min=1e-12))


def packed_rows(sites: int, ratio: float, least: int = 16) -> int:
    """Rows that the release's packed form keeps of each frame: a budget ``[[packed_rows(sites, ratio)] * frames]``."""
    return min(max(least, math.ceil(sites * ratio)), sites)


def scene_cuts(keep: Tensor, factor: float = 0.8) -> Tensor:
    """bool [B, T']: the first step, and each of which more than ``factor`` is in ``keep``, bool [B, T', h, w]."""
    cuts = keep.flatten(2).sum(2) > factor * (keep.shape[2] * keep.shape[3])
    cuts[:, :1] = True
    return cuts


def cut_before(cuts: Tensor) -> Tensor:
    """int64 [B, T']: the last cut before each step, or 0: what the divergence of a cut is taken from."""
    step = torch.arange(cuts.shape[1], dtype=torch.int64, device=cuts.device)
    last = torch.where(cuts, step, 0).cummax(1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0)) if cuts.shape[1] else last


def distinct_cuts(cuts: Tensor, divergence: Tensor, least: float = 0.4) -> Tensor:
    """bool [B, T']: the cuts but for those that diverge less than this from the cut before; a NaN stays one.

    ``divergence`` [B, T'] is the caller's, of any kind. The release compares what its language model's head says of
    the mean token of either step, by a measure that is not the Jensen-Shannon divergence it is called, and lets a NaN
    merge. Its merged frame is thrown away: what a removed cut loses is its place at the front, see ``second_score``.
    """
    distinct = cuts & ~(divergence < least)
    distinct[:, :1] = cuts[:, :1]
    return distinct


def second_score(score: Tensor, tokens: Tensor, cuts: Tensor) -> Tensor:
    """float32 [B·T'·h·w]: what the release's second stage ranks the tokens of a step by, for ``vtok.compress``.

    Args:
        score: [B, T', h, w], the gate's.
        tokens: [B, T', h·w, D], what the encoder made of every patch.
        cuts: bool [B, T']: in these a token's length counts, over the longest of its step, and not the gate.

    The packed form is ``vtok.compress(tokens, scores=second_score(...), budget=[[rows] * T'] * B)`` with the rows of
    ``packed_rows``; it comes out by position, as there.
    """
    length = tokens.to(torch.float32).norm(dim=-1)
    length = length / length.amax(2, keepdim=True).clamp(min=1e-12) + 1
    return torch.where(cuts[:, :, None], length, relative(score).flatten(2)).flatten()
