"""run_curve: what each number of runs in time costs a site at the least, and where those runs begin."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from vtok.ops import _check

SCHEMA = (
    "run_curve(Tensor tokens, Tensor cu_seqlens, Tensor tokens_per_frame, SymInt frames, *, Tensor? weights=None, "
    "SymInt extra_rows=0) -> (Tensor curve, Tensor gain, Tensor opens)"
)
WORD = 64  # frames of a mask's word


def run_curve(
    tokens: Tensor,
    cu_seqlens: Tensor,
    tokens_per_frame: Tensor,
    frames: int,
    *,
    weights: Tensor | None = None,
    extra_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each site's T rows into k runs of consecutive frames, for every k, so that their means lose the least.

    A run costs the squared distance of its rows to their mean, Σ w·|x|² - |Σ w·x|² / Σ w, and D(k) is the least sum of
    k runs' costs. Of equal ways to cut, a run opens as early as it can, the last run first.

    Args:
        tokens: float32, float16, bfloat16 or float64 (whose distance to its site's first row is rounded to float32),
            shape (S, D): V videos packed in (video, t, h, w) order. Rows may be strided; columns that are not dense are
            copied first.
        cu_seqlens: int64, shape (V+1,), video v is rows [cu_seqlens[v], cu_seqlens[v+1]); ascending from 0, at most S.
        tokens_per_frame: int64, shape (V,), the sites of each video, rows of one frame; 0 or less: it has none.
        frames: at least 1 and the T of every video, known to the host: sizes the masks and the workspace.
        weights: float32, shape (S,), >= 0: what each row weighs in its run's mean, or None for 1 each.
        extra_rows: rows of each video after its grid, >= 0. T is how many whole frames the others make.

    Returns, in the order (video, site, k): the entry of site s in k runs is cu_seqlens[v] + s·T + k - 1. Every other
    row (after a video's frames, or in no video) is a site of its own, with one frame.
        curve: float32, shape (S,), D(k), never rising; D(T) is 0 exactly.
        gain: float32, shape (S,). +inf for k = 1, else what the k-th run saves on the lower convex hull of D, never
            rising along k: the largest gains of all sites give the best numbers of runs, but for the last site taken.
        opens: int64, shape (S·W,), W = ⌈frames/64⌉: bit t % 64 of word W·entry + t//64 is set where frame t opens a
            run. An entry of k has k bits.

    A site with a NaN or an infinity, or with squares that overflow, has NaN as curve and as gain for k > 1, and its k
    runs open at its first k frames.

    Raises:
        RuntimeError: wrong rank, shape, dtype or device, frames below 1, extra_rows below 0; on the CPU also boundaries
            that do not ascend and frames below some T. On other devices looking would cost a sync: outputs are then
            without meaning, and nothing outside the tensors is touched.

    Equivalent, for one site ``x`` = (T, D) and k = 2, to ``min(cost(x[:i]) + cost(x[i:]) for i in range(1, T))`` with
    ``cost = lambda x: (x - x.mean(0)).square().sum()``. Costs come from the Gram matrix of the rows minus the first
    one: float32 dot products, their sums over runs in float64, less than 0 counted as 0. Each is off by some
    (8 + D/16)·2^-24 of the run's Σ w·|x_t - x_0|² at most: what drifts far from its first row is told apart less well.

    Moves S·D·itemsize + 8·S·(1 + W) bytes; S·T·D/2 multiplications and S·T²/6 steps of dynamic programming, which is
    what bounds it: T is meant for some hundred. CUDA keeps a site's T²/2 costs on the chip, or where they do not fit in
    a workspace of some rooms; Triton takes 4·S·frames bytes. Class T: bit-exact where the dot products and their sums
    over runs are exact in float32, else each D(k) is the least up to rounding. Not differentiable. Capturable in a
    CUDA graph; never syncs.
    """
    return torch.ops.vtok.run_curve(
        tokens, cu_seqlens, tokens_per_frame, frames, weights=weights, extra_rows=extra_rows
    )


def check(
    tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, frames: int, weights: Tensor | None, extra_rows: int
) -> None:
    op = "run_curve"
    _check.expect_dim(op, "tokens", tokens, 2, "(S, D)")
    _check.expect_float(op, "tokens", tokens)
    _check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens, tokens)
    _check.expect_index(op, "tokens_per_frame", tokens_per_frame, tokens, "(V,)")
    videos, rows = cu_seqlens.shape[0] - 1, tokens.shape[0]
    fits = tokens_per_frame.shape[0] == videos
    _check.expect(fits, op, f"tokens_per_frame of shape (V,)=({videos},)", _check.shape_text(tokens_per_frame))
    _check.expect(frames >= 1, op, "frames >= 1", frames)
    _check.expect(extra_rows >= 0, op, "extra_rows >= 0", extra_rows)
    if weights is None:
        return
    _check.expect_dim(op, "weights", weights, 1, "(S,)")
    _check.expect(weights.shape[0] == rows, op, f"weights of shape (S,)=({rows},)", _check.shape_text(weights))
    _check.expect_dtype(op, "weights", weights, torch.float32)
    _check.expect_same_device(op, "weights", weights, tokens)


def reference(
    tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, frames: int, *,
    weights: Tensor | None = None, extra_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check(tokens, cu_seqlens, tokens_per_frame, frames, weights, extra_rows)
    rows, words = tokens.shape[0], (frames + WORD - 1) // WORD
    _check.expect_ascending("run_curve", "cu_seqlens", cu_seqlens, rows, "S")
    curve = tokens.new_zeros(rows, dtype=torch.float32)
    gain, opens = torch.full_like(curve, math.inf), cu_seqlens.new_zeros(rows, words)
    opens[:, 0] = 1
    videos = zip(pairwise(cu_seqlens.tolist()), tokens_per_frame.tolist(), strict=True)  # waits for the device
    spans = [(begin, n, max(0, end - begin - extra_rows) // n) for (begin, end), n in videos if n > 0]
    longest = max((t for *_, t in spans), default=0)
    _check.expect(frames >= longest, "run_curve", f"frames of at least the longest video's {longest}", frames)
    for begin, n, t in spans:
        if t:
            part = slice(begin, begin + t * n)
            w = torch.ones_like(curve[part]) if weights is None else weights[part]
            found = curves(tokens[part].unflatten(0, (t, n)).transpose(0, 1), w.view(t, n).T.double(), words)
            curve[part], gain[part], opens[part] = (x.flatten(0, 1) for x in found)
    return curve, gain, opens.flatten()


def curves(x: Tensor, w: Tensor, words: int) -> tuple[Tensor, Tensor, Tensor]:
    """[n, T, ...] each of n sites' rows [n, T, D] and their weights float64 [n, T]."""
    cost, fine = costs(x, w)
    t = x.shape[1]
    frame, word = torch.arange(t, device=x.device), torch.arange(words, device=x.device)
    least, masks = cost[:, 0], cost.new_zeros(cost.shape[0], t, words, dtype=torch.int64)
    masks[..., 0] = 1
    points, opens = [least[:, -1]], [masks[:, -1]]
    for k in range(1, t):
        best, at = torch.full_like(least, math.inf), torch.full(least.shape, k, device=x.device)
        for i in range(k, t):  # where the last run opens
            total = least[:, i - 1, None] + cost[:, i]
            at, best = torch.where(total < best, i, at), torch.minimum(total, best)
        bit = torch.where(at[..., None] // WORD == word, 1 << at[..., None] % WORD, 0)
        least, masks = best, masks.gather(1, (at - 1)[..., None].expand_as(masks)) | bit
        points.append(least[:, -1])
        opens.append(masks[:, -1])
    curve = torch.stack(points, 1).cummin(1).values
    gain = torch.tensor([hull_gains(site) for site in curve.tolist()], dtype=torch.float32, device=x.device)
    curve = curve.masked_fill(~fine[:, None], math.nan)
    return curve, gain.where(fine[:, None] | (frame == 0), math.nan), torch.stack(opens, 1)


def costs(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 [n, T, T], what frames i to j cost as one run, +inf for i > j; bool [n], where all of it is finite)."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide - wide[:, :1]).float()
    gram = (y @ y.mT).double() * w[:, :, None] * w[:, None]
    own = gram.diagonal(dim1=1, dim2=2)
    squares = (y @ y.mT).diagonal(dim1=1, dim2=2) * w
    fine = (4 * w.sum(1) * squares.sum(1)).float().isfinite()
    rest = (2 * gram.triu().cumsum(2) - own[..., None]).triu().flip(1).cumsum(1).flip(1)  # |Σ w·y|²

    def over_runs(z: Tensor) -> Tensor:
        upto = torch.nn.functional.pad(z.cumsum(1), (1, 0))
        return upto[:, None, 1:] - upto[:, :-1, None]

    weight = over_runs(w)
    cost = torch.where(weight > 0, over_runs(squares) - rest / weight, 0).clamp(min=0).float()
    cost = torch.where(fine[:, None, None], cost, 0).triu(1)
    return cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(-1), math.inf), fine


def hull_gains(curve: list[float]) -> list[float]:
    """What each run saves along the lower convex hull of D(1), D(2), ..."""
    corners: list[int] = []
    for k, value in enumerate(curve):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (curve[a] - curve[b]) * (k - b) > (curve[b] - value) * (b - a):
                break
            corners.pop()
        corners.append(k)
    return [math.inf] + [(curve[a] - curve[b]) / (b - a) for a, b in pairwise(corners) for _ in range(b - a)]


def fake(
    tokens: Tensor, cu_seqlens: Tensor, tokens_per_frame: Tensor, frames: int, *,
    weights: Tensor | None = None, extra_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check(tokens, cu_seqlens, tokens_per_frame, frames, weights, extra_rows)
    rows = tokens.shape[0]
    curve = tokens.new_empty(rows, dtype=torch.float32)
    return curve, torch.empty_like(curve), cu_seqlens.new_empty(rows * ((frames + WORD - 1) // WORD))
