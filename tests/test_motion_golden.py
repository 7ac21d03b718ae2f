"""patch_motion and motion_gate against what the original gates returned (golden/pixels)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vtok.ops import motion_gate, patch_motion

GOLDEN = Path(__file__).with_name("golden")
CASES = {case["name"]: case for case in json.loads((GOLDEN / "pixels" / "motion.json").read_text())["cases"]}


def named(op: str) -> list[str]:
    return [name for name in CASES if CASES[name]["op"] == op]


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    arrays = np.load(GOLDEN / CASES[name]["file"], allow_pickle=False)
    return CASES[name]["params"], {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize("name", named("grt_gate"))
def test_grt(name):
    """Their score is divided by the largest of the frame, and 1 in the first."""
    params, saved = golden(name)
    reference = {"prev": "previous", "last_kept": "last_kept"}[params["reference"]]
    keep, score, _, step = motion_gate(
        saved["in_pixels"][None], [params["patch"]] * 2, params["threshold"], metric=params["metric"],
        reference=reference, refresh=params["refresh_interval"],
    )  # fmt: skip
    assert torch.equal(keep[0].flatten(1), saved["out_mask"])
    score = score[0].flatten(1)
    score[0] = 1
    score[1:] /= score[1:].amax(1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(score, saved["out_score"], rtol=0, atol=1e-4)
    assert step.tolist() == [len(score)]


@pytest.mark.parametrize("name", named("rlt"))
def test_rlt(name):
    params, saved = golden(name)
    frames, patch = saved["in_x"].transpose(1, 2), [params["patch_size"]] * 2  # theirs are (B, C, T, H, W)
    tubelet, threshold = params["tubelet_size"], params["threshold"]
    assert torch.equal((patch_motion(frames, patch, tubelet) > threshold).flatten(1), saved["out_mask"])
    keep = motion_gate(frames, patch, threshold, tubelet, reference="previous")[0]
    assert torch.equal(keep.flatten(1), saved["out_mask"])


@pytest.mark.parametrize("name", named("dtd_pixel"))
def test_dtd(name):
    """Tokens of 28 × 28 pixels from Qwen's packed patches; dropped below the threshold."""
    params, saved = golden(name)
    T, h, w = params["T"], params["h"], params["w"]
    mean, std = (torch.tensor(params[key])[:, None, None] for key in ("mean", "std"))
    packed = saved["in_pixel_values"].view(T, h, w, 2, 2, 3, 2, 14, 14)
    frames = packed.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(1, 2 * T, 3, 28 * h, 28 * w) * std + mean
    kept = patch_motion(frames, [28, 28], 2) >= params["threshold"]
    assert torch.equal(kept.view(T, h * w), saved["out_mask"])
