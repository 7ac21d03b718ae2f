"""Windows: stretches of consecutive frames that belong together, found on the device for all videos of a batch at once.

A window is told by its first frame: int64 [F], all videos' frames counted through, for each frame the first one of its
window. No window spans two videos. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok import ops
from vtok.layout import Layout

NEVER = -(2**40)  # less than any sum of gains


def frame_means(tokens: Tensor, layout: Layout) -> Tensor:
    """[F, D] in the dtype of ``tokens`` [S, D]: the mean of each frame's tokens, zeros for a frame without any."""
    row = torch.arange(layout.total, dtype=torch.int64, device=layout.device)
    frame = layout.frame_of(row) if layout.videos else row
    return ops.merge(tokens, *ops.group(frame, layout.frames))[0]


def starts_of(opens: Tensor) -> Tensor:
    """int64 [F]: the last frame up to each that opens a window."""
    frame = torch.arange(opens.shape[0], dtype=torch.int64, device=opens.device)
    return torch.where(opens, frame, 0).cummax(0).values


def window_ends(windows: Tensor) -> Tensor:
    """int64 [F]: the frame after the last one of each frame's window."""
    return torch.searchsorted(windows, windows, right=True)


def scene_windows(features: Tensor, layout: Layout, *, segments: int = 8, similarity: float = 0.9) -> Tensor:
    """DySeg: cut between frames whose cosine is below ``similarity`` or among the ``segments - 1`` least of a video.

    Args:
        features: floats [F, C], one row per frame of the batch.
        segments: how many windows a video has at least, where it has as many frames; at least 1.
        similarity: strictly below it there is a cut whatever their number. A NaN is not below, and least of all last.

    FlashVID's way, cuts below the threshold and then the least remaining ones up to a number, gives the same windows:
    what is below a threshold is always among the least. Source: FastVID's release, selection of its segments.
    """
    _, first = _frames(layout)
    each = torch.ones_like(layout.tokens_per_frame)
    alike = ops.temporal_similarity(features, layout.cu_frames, each).to(torch.float32)  # -inf in first frames
    slots = torch.arange(layout.videos + 1, dtype=torch.int64, device=layout.device) * segments
    least = ops.topk(alike, layout.cu_frames, slots, layout.videos * segments, largest=False)
    spare = torch.cat([first | (alike < similarity), first[:0].new_zeros(1)])  # the last one takes the padding
    return starts_of(spare.index_fill(0, torch.where(least < 0, layout.frames, least), True)[:-1])


def cluster_windows(
    features: Tensor, layout: Layout, *, ratio: tuple[int, int] = (1, 4), neighbours: int = 7
) -> Tensor:
    """PruneVid's windows: the frames of each video clustered (DPC-KNN), and the clusters made ``contiguous``.

    Of T frames ⌊T·ratio⌋ clusters are made, one at least. ``features`` are floats [F, C], ``ratio`` a numerator and a
    denominator. Source: PruneVid's release.
    """
    frames = layout.cu_frames.diff()
    clusters = (frames * ratio[0] // ratio[1]).clamp(min=1).minimum(frames)
    slots = torch.nn.functional.pad(clusters.cumsum(0), (1, 0))
    label, _, _ = ops.density_cluster(features, layout.cu_frames, slots, layout.frames, neighbours=neighbours)
    return contiguous(label, layout)


def contiguous(label: Tensor, layout: Layout) -> Tensor:
    """Windows from clusters of frames, ``label`` int64 [F] in [0, F), no two videos' the same.

    Of each cluster its longest runs of frames stay, all of that length, unless that is one frame. Every other stretch
    goes to the longer of the runs beside it, to the earlier of equals. Runs of one cluster that then meet are one
    window. A video none of whose runs stay is one window.
    """
    frame, first = _frames(layout)
    run = starts_of(first | (label != label.roll(1)))
    length = window_ends(run) - run
    longest = ops.merge(length.to(torch.float32)[:, None], *ops.group(label, layout.frames), reduce="max")[0][:, 0]
    stays = (length > 1) & (length == longest[label])
    before = torch.where(stays, frame, -1).cummax(0).values
    after = torch.where(stays, frame, layout.frames).flip(0).cummin(0).values.flip(0)
    video = starts_of(first)
    left = torch.where(before >= video, length[before.clamp(min=0)], 0)
    right = torch.where(after < window_ends(video), length[after.clamp(max=layout.frames - 1)], 0)
    nearest = torch.where(left >= right, before, after).clamp(0, layout.frames - 1)
    joined = torch.where((left > 0) | (right > 0), label[nearest], -1)
    return starts_of(first | (joined != joined.roll(1)))


def static_windows(still: Tensor, layout: Layout, *, most: int = 1024) -> Tensor:
    """HoliTom's windows: those that save the most tokens when what stays the same through all of one is merged.

    A window of frames s to e saves (e - s) times the sites that are the same from each of its frames to the next. The
    best sum over a video is found by a dynamic programme; of equal sums the shortest last window wins, at each frame.

    Args:
        still: int64 [S], for how many steps each row's site has been the same, 0 where it just changed
            (``sites.steps_since``).
        most: frames of the longest window, at least 1.

    For each frame the sites are counted by ``still``, of which the number that has been the same for at least so many
    steps follows: int64 [F, W] with W = min(most, T of the longest video) instead of a bit for each window and site.
    The programme itself takes T steps one after the other, each for all videos at once: the host knows T, so that
    nothing waits, but a few kernels are launched for each. Inside a graph it takes F steps where videos differ.
    Source: HoliTom's release.
    """
    steps = layout.frames
    if layout.grid_of_each is not None:
        steps = layout.grid_of_each[0]
    elif not torch.compiler.is_compiling():
        steps = max((t for t, _, _ in layout.grids), default=0)
    width = torch.sym_max(torch.sym_min(most, steps), 1)
    row = torch.arange(layout.total, dtype=torch.int64, device=still.device)
    bins = layout.frame_of(row) * width + still.clamp(max=width - 1) if layout.videos else row
    sites = ops.group(bins, layout.frames * width)[1].diff().view(layout.frames, width)
    same = sites.flip(1).cumsum(1)  # by steps, the most first: what has been the same for at least as many
    gain = same * torch.arange(width, device=still.device).flip(0)
    return starts_of(torch.ops.vtok.best_windows(gain, layout.cu_frames, steps))


@torch.library.custom_op("vtok::best_windows", mutates_args=())
def best_windows(gain: Tensor, cu_frames: Tensor, steps: int) -> Tensor:
    """bool [F]: the frames that begin a window of the best split of each video.

    ``gain`` int64 [F, W]: what a window of W, ..., 2, 1 frames that ends with the frame is worth; the last is 0.
    """
    frames, width = gain.shape
    opens = torch.zeros(frames, dtype=torch.bool, device=gain.device)
    if frames == 0:
        return opens
    start, videos = cu_frames[:-1], cu_frames.shape[0] - 1
    length = torch.arange(width, 0, -1, device=gain.device)
    best = gain.new_full((videos, width + steps), NEVER)
    best[:, width - 1] = 0  # of no frame at all
    last = gain.new_ones(videos, max(steps, 1))
    for t in range(steps):
        total = best[:, t : t + width] + gain[(start + t).clamp(max=frames - 1)]
        key = (total * (width + 1) - length).amax(1)  # the most, then the shortest
        last[:, t] = -key % (width + 1)
        best[:, t + width] = (key + last[:, t]) // (width + 1)
    frame = torch.arange(frames, device=gain.device)
    video = torch.searchsorted(cu_frames, frame, right=True) - 1
    begin = frame - last[video, frame - start[video]] + 1  # of the window that ends with each frame
    # From the last frame of each video back, each time twice as far.
    ends = torch.cat([(frame + 1 == cu_frames[1:][video]), opens[:1]])
    back = torch.cat([torch.where(begin > start[video], begin - 1, frames), frame.new_full((1,), frames)])
    for _ in range(steps.bit_length()):
        ends = ends.index_fill(0, torch.where(ends, back, frames), True)
        back = back[back]
    return opens.index_fill(0, torch.where(ends[:-1], begin, cu_frames[:1]), True)


@best_windows.register_fake
def _best_windows(gain: Tensor, cu_frames: Tensor, steps: int) -> Tensor:
    return gain.new_empty(gain.shape[0], dtype=torch.bool)


def _frames(layout: Layout) -> tuple[Tensor, Tensor]:
    """(int64 [F] 0, 1, 2, ..., bool [F] whether each is its video's first)."""
    frame = torch.arange(layout.frames, dtype=torch.int64, device=layout.device)
    begin = torch.searchsorted(layout.cu_frames, frame, right=True) - 1
    return frame, layout.cu_frames[begin] == frame
