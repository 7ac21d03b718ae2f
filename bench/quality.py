"""How much of a clip each method loses at the same number of rows; no weights are needed.

    python tools/fetch_clip.py .cache/bikes.mp4                     # and others; Debian's opencv-doc has vtest.avi
    python -m vtok.bench.quality .cache/*.mp4 --out docs/quality    # writes docs/quality.json and docs/quality.png

The tokens are the clip's own patches, pixels from -1 to 1. A method's loss is the mean squared error of ``unmerge()``:
a merged patch is the mean of those it stands for, a dropped one the last kept at its site. All have the same budgets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtok
from vtok import Packed, methods, trial, video

PATCH, SIZE, FRAMES = 16, 256, 32
SHARES = ("5%", "10%", "15%", "20%", "30%", "45%", "60%")
RUNS = "runs along time"
FAMILIES = {
    RUNS: ("optimal", "temporal_merge", "mavors", "framefusion", "evs", "dtd", "dycoke", "longvu_stc"),
    "pixels": ("grt", "rlt", "dtd_pixel", "residualvit"),
    "pairs anywhere": ("tome", "videochat_flash"),
    "clusters and outliers": ("fastvid", "prunevid", "holitom", "flashvid", "sttm", "scissor", "vidcom2"),
    "baselines": ("uniform", "random"),
}
COLOURS = ("#1f6fb4", "#7b3fa0", "#d9730d", "#2e8b57", "#777777")
MARKERS = "osD^vPX*"
UNBUDGETED = ("b_vllm",)


def losses(frames: Tensor) -> tuple[dict[str, list[float | None]], dict[str, str]]:
    """Of uint8 frames (T, H, W, 3) each method's loss at each share, None where it refused; and its sentence then."""
    tokens = trial.patchify(frames, PATCH)
    rows, pixels = tokens.flatten(0, -2), trial.normalised(frames)
    found: dict[str, list[float | None]] = {}
    refusals: dict[str, str] = {}
    for name in methods.names():
        if name in UNBUDGETED:
            continue
        work = _gate(pixels, name) if methods.get(name).kind == "gate" else _compress(tokens, name)
        found[name] = []
        for share in SHARES:
            try:
                found[name].append(loss(work(share), rows))
            except ValueError as error:
                found[name].append(None)
                refusals[name] = str(error)
    return found, refusals


def loss(packed: Packed, rows: Tensor) -> float:
    """The mean squared error of what ``packed`` makes of the rows [S, D] it came from."""
    rebuilt = packed.unmerge(packed.reduce(rows), fill="hold")
    return (rebuilt - rows).square().mean(dtype=torch.float64).item()


def _compress(tokens: Tensor, name: str) -> Callable[[str], Packed]:
    return lambda share: vtok.compress(tokens, budget=share, method=name)


def _gate(pixels: Tensor, name: str) -> Callable[[str], Packed]:
    return lambda share: vtok.gate_patches(pixels, patch=PATCH, budget=share, method=name)


def measure(clip: Path, fps: Fraction) -> dict[str, Any]:
    """The first ``FRAMES`` frames of the clip."""
    frames = next(video.chunks(clip, fps=fps, size=SIZE, patch=PATCH, frames=FRAMES)).frames
    found, refusals = losses(frames)
    return {
        "clip": clip.name,
        "frames": len(frames),
        "size": list(frames.shape[1:3]),
        "mse": found,
        "refused": refusals,
    }


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    clips, shares = report["clips"], [float(share.rstrip("%")) for share in report["shares"]]
    columns = 3
    lines = -(-(len(clips) + 1) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(15, 4.6 * lines), squeeze=False)
    cells = list(axes.flat)
    for cell, clip in zip(cells, clips, strict=False):
        for name, mse in clip["mse"].items():
            drawn = [(x, y) for x, y in zip(shares, mse, strict=True) if y]
            if drawn:
                cell.plot(*zip(*drawn, strict=True), label=name, **style(name))
        cell.set(yscale="log", title=f"{clip['clip']}, {clip['frames']} frames", xlabel="rows kept, %")
        cell.grid(alpha=0.25)
    for cell in axes[:, 0]:
        cell.set_ylabel("mean squared error of unmerge()")
    for cell in cells[len(clips) :]:
        cell.axis("off")
    _legend(cells[len(clips)], {name for clip in clips for name in clip["mse"]})
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def family(name: str) -> tuple[str, int]:
    """The method's family, and its place in it."""
    for title, members in FAMILIES.items():
        if name in members:
            return title, members.index(name)
    return "others", 0


def style(name: str) -> dict[str, Any]:
    if name == "optimal":
        return {"color": "black", "linewidth": 2.5, "marker": "o", "markersize": 4, "zorder": 5}
    title, place = family(name)
    colour = COLOURS[list(FAMILIES).index(title)] if title in FAMILIES else "#b22222"
    return {"color": colour, "linewidth": 1, "marker": MARKERS[place], "markersize": 4, "alpha": 0.85}


def _legend(cell: Any, names: set[str]) -> None:
    from matplotlib.lines import Line2D

    entries = []
    for title in (*FAMILIES, "others"):
        members = sorted((name for name in names if family(name)[0] == title), key=lambda name: family(name)[1])
        if members:
            entries.append(Line2D([], [], linestyle="none", label=title))
            entries += [Line2D([], [], label=f"  {name}", **style(name)) for name in members]
    cell.legend(handles=entries, loc="center", ncols=2, frameon=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vtok.bench.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("clips", nargs="+", type=Path, metavar="CLIP")
    parser.add_argument("--fps", type=Fraction, default=Fraction(4), help="frames a second that are looked at")
    parser.add_argument("--out", type=Path, required=True, help="where the .json and the .png go")
    options = parser.parse_args(argv)
    try:
        clips = [measure(clip, options.fps) for clip in options.clips]
    except video.VideoError as error:
        parser.error(str(error))
    report = {"fps": str(options.fps), "patch": PATCH, "shares": SHARES, "clips": clips}
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
