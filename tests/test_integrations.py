"""The engines' retention mask and count, against what the original returned (golden/tokens/evs__*)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vtok import Layout, methods
from vtok.integrations import retained_tokens_count, retention_mask

GOLDEN = Path(__file__).with_name("golden")
CASES = {case["name"]: case for case in json.loads((GOLDEN / "tokens" / "evs.json").read_text())["cases"]}
MASKS = [name for name in CASES if name not in ("evs__counts", "evs__bf16_t8_d64")]


def arrays(name):
    return np.load(GOLDEN / CASES[name]["file"], allow_pickle=False)


def mask_of(name, tokens, **options):
    params = CASES[name]["params"]
    return retention_mask(tokens, params["thw"], params["spatial_merge_size"], params["q"], **options).numpy()


@pytest.mark.parametrize("compat", [None, "vllm"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_the_original(name, compat):
    golden = arrays(name)
    mask = mask_of(name, torch.from_numpy(golden["in_x"]), compat=compat)
    assert (mask == golden["out_mask"]).all()
    assert mask.sum() == golden["out_count"]


def test_bfloat16_with_float32_scores_and_with_theirs():
    golden = arrays("evs__bf16_t8_d64")
    tokens = torch.from_numpy(golden["in_x"]).view(torch.bfloat16)
    assert (mask_of("evs__bf16_t8_d64", tokens) == golden["out_mask_fp32"]).all()
    theirs = mask_of("evs__bf16_t8_d64", tokens, compat="vllm")
    assert theirs.sum() == golden["out_count"]
    assert (theirs == golden["out_mask_bf16"]).all()
    layout = Layout.from_grid([CASES["evs__bf16_t8_d64"]["params"]["thw"]], merge_size=2)
    scores = methods.get("evs").call(tokens, layout, None, compat="vllm")
    assert (scores[:16] == 255).all()
    want = torch.from_numpy(golden["out_score_bf16"]).view(torch.bfloat16)
    assert torch.equal(scores[16:].to(torch.bfloat16).view(7, 16), want)


def test_counts_of_the_original():
    golden = arrays("evs__counts")
    for n, t, q, count in zip(golden["in_n"], golden["in_T"], golden["in_q"], golden["out_count"], strict=True):
        assert retained_tokens_count(n, t, float(q)) == count


def test_the_float_trap():
    assert retained_tokens_count(240, 16, 0.9) == 383
    assert retained_tokens_count(196, 32, 0.9) == 627
    assert retained_tokens_count(120, 32, 0.9) == 383
    assert retained_tokens_count(196, 2, 0.7) == 196


@pytest.mark.parametrize("frames", [1, 2, 3, 16])
@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("method", ["evs", "uniform", "random"])
def test_the_mask_has_the_count(frames, q, method):
    mask = retention_mask(torch.randn(frames * 12, 8), torch.tensor([frames, 6, 8]), 2, q, method=method)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == retained_tokens_count(12, frames, q)
    assert frames > 1 or mask.all()


def test_compat_is_another_selection():
    """Scores in bfloat16 tie often; those in float32 do not: same count, other rows."""
    tokens = (torch.randn(1, 49, 64) + 0.05 * torch.randn(32, 49, 64)).to(torch.bfloat16).reshape(-1, 64)
    a, b = (retention_mask(tokens, (32, 14, 14), 2, 0.75, compat=compat) for compat in (None, "vllm"))
    assert int(a.sum()) == int(b.sum())
    assert not torch.equal(a, b)


def test_errors():
    tokens = torch.randn(24, 4)
    with pytest.raises(ValueError, match=r"expected q in \[0, 1\), got 1.0"):
        retention_mask(tokens, (2, 6, 8), 2, 1.0)
    with pytest.raises(ValueError, match="expected tokens of 24 rows, as grid_thw says, got 23"):
        retention_mask(tokens[1:], (2, 6, 8), 2, 0.5)
    with pytest.raises(ValueError, match="expected video_size_thw on the host, got a tensor on meta"):
        retention_mask(tokens, torch.ones(3, dtype=torch.int64, device="meta"), 2, 0.5)
    with pytest.raises(ValueError, match="divisible by merge_size=2"):
        retention_mask(tokens, (2, 5, 8), 2, 0.5)
    with pytest.raises(ValueError, match="expected compat None or 'vllm', got 'hf'"):
        retention_mask(tokens, (2, 6, 8), 2, 0.5, compat="hf")
    with pytest.raises(TypeError, match=r"expected tokens_per_frame as an integer, got 1\.5"):
        retained_tokens_count(1.5, 2, 0.5)
