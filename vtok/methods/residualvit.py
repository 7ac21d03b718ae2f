"""residualvit: whole frames now and then, and of the frames between them a fixed number of patches."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from vtok import ops, patterns
from vtok.layout import constant_in_graph, upload, whole_number
from vtok.methods import Gated, register

MODES = ("motion", "uniform", "center", "random", "map")


def rows_of_each_frame(grid: tuple[int, int, int], *, clip: int = 3, drop: float = 0.85, **_: Any) -> list[int]:
    """Every ``clip``-th step whole, ``patterns.residualvit_count`` patches of each other: the method's own budget."""
    steps, h, w = grid
    whole, some = set(patterns.interleave(steps, clip)), patterns.residualvit_count(h * w, drop) if h * w else 0
    return [h * w if t in whole else some for t in range(steps)]


@register("residualvit", kind="gate", budget=rows_of_each_frame)
def residualvit(
    frames: Tensor,
    patch: tuple[int, int],
    tubelet: int,
    threshold: float | None,
    state: Any,
    *,
    mode: str = "motion",
    clip: int = 3,
    drop: float = 0.85,
    magnitude: Tensor | None = None,
    noise: Tensor | None = None,
    compat: str | None = None,
) -> Gated:
    """Every ``clip``-th step is kept whole; of the steps between, those patches that ``mode`` names.

    Args:
        mode: "motion", the patches that differ most from the step before (root of the sum of squares); "uniform",
            evenly spread over the frame; "center", those nearest to its middle; "random", the largest of ``noise``;
            "map", the largest sum of ``magnitude`` over a patch.
        clip, drop: without a budget of the caller every ``clip``-th step keeps all and every other one
            ``patterns.residualvit_count(sites, drop)`` patches, the release's own count.
        magnitude: [B, T', H, W], how much each pixel moved, such as a codec's residual or the length of its vectors.
            The release sums signed vectors, in which opposite motions cancel.
        noise: [B, T', h, w], any draws.
        compat: "residualvit" for the skewed "center" pattern of the release.

    Rows come out by position, ties by the lower one (the release: by score). The residual token, a learned projection
    of the whole frame's embedding, is the model's to insert.

    Source: the released code of ResidualViT and zs-video-eval. It has no threshold.
    """
    if threshold is not None:
        raise ValueError("method 'residualvit': expected a budget or none, got a threshold")
    videos, steps, h, w = grid = _grid(frames, patch, tubelet)
    whole = torch.zeros(steps, dtype=torch.bool, device=frames.device)
    whole[:: whole_number("clip", clip, least=1)] = True
    if mode == "motion":
        score = ops.patch_motion(frames, list(patch), tubelet, metric="l2", span="whole").float()
    elif mode == "map":
        given = _expected("magnitude", magnitude, (videos, steps, *frames.shape[3:]))
        score = torch.nn.functional.avg_pool2d(given.float(), patch, divisor_override=1)
    elif mode == "random":
        score = _expected("noise", noise, grid).float()
    elif mode in MODES:
        # Host arithmetic: inside a graph it fixes the size of a frame, and a symbolic float becomes a constant.
        h, w = operator.index(h), operator.index(w)
        sites = pattern(mode, h, w, float.fromhex(float(drop).hex()), compat)
        score = torch.zeros(h * w, device=frames.device).index_fill(0, upload(sites, frames.device), 1)
        score = score.view(h, w).expand(grid)
    else:
        raise ValueError(f"method 'residualvit': expected mode among {MODES}, got {mode!r}")
    return Gated(score.masked_fill(whole[:, None, None], math.inf))


@constant_in_graph
def pattern(mode: str, h: int, w: int, drop: float, compat: str | None) -> list[int]:
    """The sites of a frame that "uniform" and "center" keep."""
    kept = patterns.residualvit_count(h * w, drop) if h * w else 0
    return patterns.uniform(h * w, kept) if mode == "uniform" else patterns.center(h, w, kept, compat=compat)


def _grid(frames: Tensor, patch: tuple[int, int], tubelet: int) -> tuple[int, int, int, int]:
    videos, count, _, height, width = frames.shape
    return videos, count // tubelet, height // patch[0], width // patch[1]


def _expected(name: str, given: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if given is None or given.shape != shape:
        got = "none" if given is None else tuple(given.shape)
        raise ValueError(f"method 'residualvit': expected {name} of shape {shape}, got {got}")
    return given
