"""Writes docs/gating.json and docs/gating.png: a real clip gated before SigLIP so400m, at three thresholds.

    python tools/fetch_clip.py .cache/carphone_pristine.mp4 && python tools/gating.py .cache/carphone_pristine.mp4

No weights are needed: the operations follow from the model's sizes and from which patches are kept.
"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

import vtok
from vtok import trial, video
from vtok.draw import draw, kept_per_frame, residuals, sheet
from vtok.integrations.tower import tower_flops

DOCS = Path(__file__).resolve().parent.parent / "docs"
SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
THRESHOLDS = (1.0, 2.0, 4.0)  # root of the sum of squares over a patch, pixels from -1 to 1
SHOWN = 1  # of them is in the picture


def main(clip: Path) -> None:
    with torch.device("meta"):
        tower = SiglipVisionModel(SiglipVisionConfig(**SO400M))
    patch = SO400M["patch_size"]
    frames = video.read(clip, fps=Fraction(6), size=SO400M["image_size"], patch=patch).frames
    rows = []
    for threshold in THRESHOLDS:
        packed = vtok.gate_patches(trial.normalised(frames), patch=patch, threshold=threshold, method="grt").trim()
        rebuilt = trial.unpatchify(packed, packed.values, frames.shape, patch)
        rows.append({
            "threshold": threshold,
            "kept": packed.index.shape[0] / packed.layout.total,
            "flops": tower_flops(tower, packed),
            "psnr": trial.psnr(frames, rebuilt),
        })  # fmt: skip
        if threshold == THRESHOLDS[SHOWN]:
            picture(frames, packed, rebuilt, patch, rows[-1])
    whole = {"clip": clip.name, "frames": len(frames), "flops": tower_flops(tower, packed.layout), "gates": rows}
    (DOCS / "gating.json").write_text(json.dumps(whole, indent=1) + "\n")


def picture(frames: torch.Tensor, packed: vtok.Packed, rebuilt: torch.Tensor, patch: int, row: dict) -> None:
    """Six moments: the kept patches, and under them what each adds to what was there."""
    shown, added = draw(frames, packed, patch=patch), residuals(frames, rebuilt, packed, patch=patch)
    cells = [round(i * (len(frames) - 1) / 5) for i in range(6)]
    counts, sites = kept_per_frame(frames, packed), packed.layout.total // len(frames)
    labels = [(f"frame {t}", f"kept {counts[t]} of {sites}") for t in cells] + [("what they add", "")] * 6
    facts = (
        f"{row['kept']:.0%} of the patches kept by grt at threshold {row['threshold']:g}  ·  PSNR {row['psnr']:.1f} dB"
    )
    sheet(torch.cat([shown[cells], added[cells]]), labels, "Before the encoder", facts).save(
        DOCS / "gating.png", optimize=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
