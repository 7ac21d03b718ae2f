"""The token methods against what the originals returned (golden/tokens)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vtok import Layout, compress
from vtok.methods import dtd, vidcom2

GOLDEN = Path(__file__).with_name("golden")
FILES = [GOLDEN / "tokens" / f"{name}.json" for name in ("dtd", "dycoke", "framefusion", "longvu_stc", "vidcom2")]
CASES = {case["name"]: case for file in FILES for case in json.loads(file.read_text())["cases"]}


def named(prefix):
    return [name for name in CASES if name.startswith(prefix)]


def arrays(name):
    golden = np.load(GOLDEN / CASES[name]["file"], allow_pickle=False)
    tensors = {key: torch.from_numpy(golden[key]) for key in golden.files}
    for side in ("inputs", "outputs"):
        for key, told in CASES[name][side].items():
            if "bfloat16" in told["dtype"]:
                tensors[key] = tensors[key].view(torch.bfloat16)
    return tensors, CASES[name]["params"]


@pytest.mark.parametrize("name", named("dtd_feature"))
def test_dtd(name):
    golden, params = arrays(name)
    steps, h, w = params["T"], params["h"], params["w"]
    amount = {"threshold": params["threshold"]}
    if not params["absolute"]:
        amount = {"budget": [[h * w] + [dtd.relative_rows(h * w, params["threshold"])] * (steps - 1)]}
    packed = compress(golden["in_x"], [(steps, h, w)], method="dtd", **amount).trim()
    assert torch.equal(packed.mask.view(steps, -1), golden["out_mask"])
    assert torch.equal(packed.values, golden["in_x"][packed.index])


@pytest.mark.parametrize("name", named("dycoke"))
def test_dycoke(name):
    golden, params = arrays(name)
    grid = (params["frames"], 1, params["tokens_per_frame"])
    packed = compress(golden["in_x"], [grid], method="dycoke", drop=params["drop_fraction"], compat="dycoke")
    assert torch.equal(packed.index, golden["out_index"].sort().values)


@pytest.mark.parametrize("name", named("vidcom2_ref"))
def test_vidcom2_of_the_authors(name):
    golden, params = arrays(name)
    layout = Layout.from_grid([(params["T"], 1, params["tokens_per_frame"])])
    mask = vidcom2.reference_mask(golden["in_x"], layout, params["retention"])
    packed = compress(golden["in_x"], layout, scores=mask.float(), threshold=0.5).trim()
    assert torch.equal(packed.index, golden["out_index"])
    assert torch.equal(packed.frame_counts, golden["out_per_frame"])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", named("vidcom2_vllm"))
def test_vidcom2_of_vllm(name, exact):
    golden, params = arrays(name)
    layout, q = Layout.from_grid([params["thw"]], params["spatial_merge_size"]), params["q"]
    rows = vidcom2.vllm_rows(layout.frames, layout.sites, q)
    assert rows == golden["out_count"]
    packed = compress(golden["in_x"], layout, budget=rows, method="vidcom2", share=1 - q if exact else None)
    assert torch.equal(packed.mask, golden["out_mask"])


@pytest.mark.parametrize("name", named("longvu_stc"))
def test_longvu_stc(name):
    golden, params = arrays(name)
    settings = {"threshold": params["drop_threshold"], "block": params["chunk"], "most": params["max_visual_len"]}
    grid = (params["T"], 1, params["tokens_per_frame"])
    packed = compress(golden["in_x"], [grid], method="longvu_stc", **settings).trim()
    assert torch.equal(packed.index, golden["out_index"])


@pytest.mark.parametrize("name", named("framefusion"))
def test_framefusion(name):
    golden, params = arrays(name)
    prefix, rows = params["prefix"], params["T"] * params["tokens_per_frame"]
    tokens = golden["in_x"][prefix : prefix + rows]  # the words around them stay as they are
    grid = (params["T"], 1, params["tokens_per_frame"])
    packed = compress(tokens, [grid], method="framefusion", threshold=params["threshold"]).trim()
    assert torch.equal(packed.mask, golden["out_mask"][prefix : prefix + rows])
    want = golden.get("out_merged", golden.get("out_merged_fp32"))[prefix : prefix + len(packed.index)]
    wide = compress(tokens.float(), [grid], method="framefusion", threshold=params["threshold"]).trim()
    assert torch.allclose(wide.values, want, rtol=1e-5, atol=2e-5)
    assert torch.equal(packed.values, wide.values.to(tokens.dtype))  # rounded once, at the end
    exact = compress(tokens, [grid], method="framefusion", budget=len(packed.index), similarity=params["threshold"])
    assert torch.equal(exact.values, packed.values) and torch.equal(exact.assignment, packed.assignment)
