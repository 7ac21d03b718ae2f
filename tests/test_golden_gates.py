"""The pixel methods against what the originals returned (golden/pixels)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vtok import gate_patches, methods
from vtok.methods import dtd_pixel, grt

GOLDEN = Path(__file__).with_name("golden")
FILES = [GOLDEN / "pixels" / f"{name}.json" for name in ("motion", "relative", "residualvit")]
CASES = {case["name"]: case for file in FILES for case in json.loads(file.read_text())["cases"]}


def named(prefix):
    return [name for name in CASES if name.startswith(prefix)]


def arrays(name):
    golden = np.load(GOLDEN / CASES[name]["file"], allow_pickle=False)
    return {key: torch.from_numpy(golden[key]) for key in golden.files}, CASES[name]["params"]


@pytest.mark.parametrize("name", named("grt_gate"))
def test_grt(name):
    golden, params = arrays(name)
    frames, patch = golden["in_pixels"][None], params["patch"]
    reference = {"prev": "previous"}.get(params["reference"], params["reference"])
    packed = gate_patches(
        frames, patch=patch, threshold=params["threshold"], metric=params["metric"], reference=reference,
        refresh=params["refresh_interval"],
    ).trim()  # fmt: skip
    steps = frames.shape[1]
    assert torch.equal(packed.mask.view(steps, -1), golden["out_mask"])
    score = packed.scores.view(1, steps, frames.shape[3] // patch, -1)
    assert torch.allclose(grt.relative(score).view(steps, -1), golden["out_score"], atol=1e-4)
    embedded = packed.values @ golden["in_weight"].flatten(1).T + golden["in_bias"]
    carried = packed.unmerge(embedded, fill="hold").view(steps, -1, 8)
    assert torch.allclose(carried, golden["out_embeddings"], atol=1e-4)


@pytest.mark.parametrize("name", named("rlt"))
def test_rlt(name):
    golden, params = arrays(name)
    frames = golden["in_x"].transpose(1, 2)  # the original's are [B, C, T, H, W]
    packed = gate_patches(
        frames, patch=params["patch_size"], tubelet=params["tubelet_size"], threshold=params["threshold"], method="rlt"
    ).trim()
    assert torch.equal(packed.mask.view(frames.shape[0], -1), golden["out_mask"])
    assert torch.equal(packed.run_lengths, golden["out_lengths_thw"])


@pytest.mark.parametrize("name", named("dtd_pixel"))
def test_dtd_pixel(name):
    golden, params = arrays(name)
    steps, h, w = next([params["T"], *side] for side in [(params["h"], params["w"])])
    cut = golden["in_pixel_values"].view(steps, h, w, 2, 2, 3, 2, 14, 14)  # units of 2x2 patches of two frames
    frames = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(1, 2 * steps, 3, 28 * h, 28 * w)
    mean, std = (torch.tensor(params[key])[:, None, None] for key in ("mean", "std"))
    amount = {"threshold": params["threshold"]}
    if not params["absolute"]:
        amount = {"budget": [[h * w] + [dtd_pixel.relative_rows(h * w, params["threshold"])] * (steps - 1)]}
    packed = gate_patches(frames * std + mean, patch=14, merge_size=2, tubelet=2, method="dtd_pixel", **amount)
    assert torch.equal(packed.mask.view(steps, -1), golden["out_mask"])


@pytest.mark.parametrize("name", named("residualvit"))
def test_residualvit(name):
    golden, params = arrays(name)
    side, cell = math.isqrt(params["patches"]), params["cell"]
    frames = torch.zeros(1, 3, 1, side * cell, side * cell)
    magnitude = torch.cat([torch.zeros_like(golden["in_score_map"][:1]), golden["in_score_map"]])[None]
    settings = {"patch": cell, "method": "residualvit", "drop": params["drop_prob"], "compat": "residualvit"}
    for mode, want in [("uniform", [golden["out_uniform"]] * 2), ("center", [golden["out_center"]] * 2),
                       ("map", golden["out_residual_topk"].sort(1).values)]:  # fmt: skip
        packed = gate_patches(frames, mode=mode, magnitude=magnitude, **settings)
        assert packed.frame_counts.tolist() == [params["patches"]] + [params["kept"]] * 2
        for t in (1, 2):
            kept = packed.index[packed.positions[:, 0] == t] - t * params["patches"]
            assert torch.equal(kept, want[t - 1])


def test_residualvit_clips_and_errors():
    frames = torch.randint(0, 256, (2, 7, 3, 16, 16), dtype=torch.uint8)
    packed = gate_patches(frames, patch=4, method="residualvit", clip=3, drop=0.75)
    assert packed.frame_counts.tolist() == [16, 4, 4, 16, 4, 4, 16] * 2
    motion = (frames[:, 1].int() - frames[:, 0].int()).float().square().sum(1)
    patches = torch.nn.functional.avg_pool2d(motion, 4).flatten(1)
    second = packed.index[packed.positions[:, 0] == 1].view(2, 4) - torch.tensor([[16], [16 * 8]])
    assert torch.equal(second, patches.topk(4).indices.sort(1).values)
    assert gate_patches(frames, patch=4, method="residualvit", budget=50).values.shape[0] == 100
    noise = torch.rand(2, 7, 4, 4)
    drawn = gate_patches(frames, patch=4, method="residualvit", mode="random", noise=noise)
    assert drawn.frame_counts.tolist() == [16, 2, 2] * 2 + [16] + ([16, 2, 2] * 2 + [16])
    errors = {
        "expected mode among": {"mode": "much"}, "expected a budget or none": {"threshold": 1.0},
        "expected magnitude of shape": {"mode": "map"}, "expected noise of shape": {"mode": "random"},
        "expected clip of at least 1, got 0": {"clip": 0, "budget": 50},
    }  # fmt: skip
    for text, change in errors.items():
        with pytest.raises(ValueError, match=text):
            gate_patches(frames, patch=4, method="residualvit", **change)
    assert "residualvit" in methods.names("gate")
