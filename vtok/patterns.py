"""Patterns: which sites of a frame stay whatever it shows, and which frames of a clip stay whole.

All of it is host arithmetic, so that processor and model agree before any tensor exists. The rules are those of
ResidualViT, whose clips are one whole frame ("I") followed by frames of which few patches are kept ("P").
"""

from __future__ import annotations

import torch

from vtok.layout import whole_number


def uniform(sites: int, k: int) -> list[int]:
    """k sites from first to last, evenly spread: ``torch.linspace(0, sites - 1, k, dtype=torch.int64)``, which steps
    from both ends in float64 and truncates. Ascending; one site is the first."""
    sites, k = whole_number("sites", sites, least=0), _kept(k, sites)
    if k == 1:
        return [0]
    last = sites - 1
    step = last / (k - 1) if k else 0.0
    return [int(step * i) if i < k // 2 else int(last - step * (k - 1 - i)) for i in range(k)]


def center(side_h: int, side_w: int, k: int, *, compat: str | None = None) -> list[int]:
    """The k sites nearest to the middle of a side_h x side_w grid, ascending; of equally near ones the lower.

    ``compat="residualvit"`` takes site / side as the row of a site, with its fraction, as the published code does on
    its square grids: the pattern is skewed. There ties fall anyhow; here to the lower site.
    """
    side_h, side_w = whole_number("side_h", side_h, least=0), whole_number("side_w", side_w, least=0)
    k = _kept(k, side_h * side_w)
    if compat not in (None, "residualvit"):
        raise ValueError(f"expected compat None or 'residualvit', got {compat!r}")
    if compat and side_h != side_w:
        raise ValueError(f"expected a square grid with compat='residualvit', got {side_h}x{side_w}")

    def distance(site: int) -> int:  # squared, in units of 1 / (2 * side_w): integers have no rounding
        row = site if compat else site // side_w * side_w
        return (2 * row - (side_h - 1) * side_w) ** 2 + ((2 * (site % side_w) - (side_w - 1)) * side_w) ** 2

    return sorted(sorted(range(side_h * side_w), key=distance)[:k])  # sorted is stable: ties by the lower site


def residualvit_count(sites: int, drop: float, *, training: bool = False) -> int:
    """Sites of a P frame that stay: sites·(1 - drop), at least 1.

    In inference the product is rounded to float32 and then half to even; in training it is cut off.
    """
    sites = whole_number("sites", sites, least=1)
    if not 0 <= drop < 1:
        raise ValueError(f"expected drop in [0, 1), got {drop}")
    share = sites * (1 - drop)
    return max(1, int(share if training else torch.tensor(share, dtype=torch.float32).round()))


def interleave(frames: int, clip: int) -> list[int]:
    """The frames that stay whole: the first of every ``clip`` frames (3 in the paper, 2 to 11 in its scripts)."""
    frames, clip = whole_number("frames", frames, least=0), whole_number("clip", clip, least=1)
    return list(range(0, frames, clip))


def _kept(k: int, sites: int) -> int:
    k = whole_number("k", k, least=0)
    if k > sites:
        raise ValueError(f"expected k of at most {sites} sites, got {k}")
    return k
