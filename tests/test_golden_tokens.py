"""The token methods against what the originals returned (golden/tokens)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vtok import Layout, compress, ops
from vtok.methods import dtd, vidcom2
from vtok.sites import steps_since
from vtok.windows import cluster_windows, frame_means, scene_windows, static_windows

GOLDEN = Path(__file__).with_name("golden")
NAMES = ("dtd", "dycoke", "fastvid", "framefusion", "holitom", "longvu_stc", "prunevid", "vidcom2")
FILES = [GOLDEN / "frames" / "fastvid.json", *(GOLDEN / "tokens" / f"{name}.json" for name in NAMES)]
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
    rank = -packed.take(packed.scores)  # the release's order: within a frame the least alike first, whole frames as is
    order = sorted(range(len(rank)), key=lambda k: (int(packed.positions[k, 0]), float(rank[k]), k))
    assert torch.equal(packed.index[order], golden["out_index"])


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


def lengths(windows):
    return windows.unique(return_counts=True)[1].tolist()


@pytest.mark.parametrize("name", named("fastvid_dyseg"))
def test_fastvid_scenes(name):
    golden, params = arrays(name)
    layout = Layout.from_grid([(len(golden["in_frame_features"]), 1, 1)])
    windows = scene_windows(golden["in_frame_features"], layout, segments=params["c"], similarity=params["tau"])
    assert lengths(windows) == golden["out_segment_sizes"].tolist()


@pytest.mark.parametrize("name", named("fastvid__"))
def test_fastvid(name):
    golden, params = arrays(name)
    prefix, frames, n = params["prefix"], params["frames"], params["tokens_per_frame"]
    tokens, every, blend = golden["in_hidden"][prefix : prefix + frames * n], params["dtm_p"], params["dtm_beta"]
    packed = compress(
        tokens, [(frames, 1, n)], method="fastvid", budget=int(n * params["retention_ratio"]) * frames,
        attention=golden["in_attn"], features=golden["in_frame_features"], segments=params["dyseg_c"],
        similarity=params["dyseg_tau"], contextual=params["stprune_d"], every=every, blend=blend, compat="fastvid",
    )  # fmt: skip
    assert torch.equal(packed.index, golden["out_kept"][prefix : -params["suffix"]] - prefix)
    assert torch.allclose(packed.values, golden["out_rows"][prefix : -params["suffix"]], atol=1e-5)


@pytest.mark.parametrize("name", named("prunevid_merge"))
def test_prunevid(name):
    golden, params = arrays(name)
    layout = Layout.from_grid([(params["T"], params["h"], params["w"])])
    assert lengths(cluster_windows(frame_means(golden["in_x"], layout), layout)) == golden["out_windows"].tolist()
    settings = {"similarity": params["threshold"], "cluster_ratio": params["cluster_ratio"]}
    want = golden["out_tokens"]  # window by window, the static ones first
    packed = compress(golden["in_x"], layout, budget=len(want), method="prunevid", **settings)
    away = torch.cdist(packed.values, want, compute_mode="donot_use_mm_for_euclid_dist")
    assert away.argmin(1).sort().values.tolist() == list(range(len(want))) and away.amin(1).max() < 1e-5


@pytest.mark.parametrize("name", named("holitom_static"))
def test_holitom_of_static_tokens(name):
    golden, params = arrays(name)
    layout = Layout.from_grid([(params["T"], 1, params["tokens_per_frame"])])
    alike = ops.temporal_similarity(golden["in_x"], layout.cu_seqlens, layout.tokens_per_frame)
    windows = static_windows(steps_since(~(alike > params["tau"]), layout), layout, most=params["max_window"])
    start, end = golden["out_windows"].T
    assert windows.unique().tolist() == start.tolist() and lengths(windows) == (end - start + 1).tolist()
    dynamic = int((golden["out_dynamic_counts"] * (end - start + 1)).sum())
    packed = compress(
        golden["in_x"], layout, method="holitom", budget=dynamic + len(golden["out_static_tokens"]),
        similarity=params["tau"], most=params["max_window"],
    )  # fmt: skip
    static = packed.weight > 1
    assert torch.equal(packed.positions[static][:, 2], golden["out_static_pos"])
    assert torch.allclose(packed.values[static], golden["out_static_tokens"], atol=1e-6)
    assert len(golden["in_x"]) - len(packed.index) == golden["out_total_reduced"]


@pytest.mark.parametrize("name", named("holitom_dominant"))
def test_holitom_of_dominant_tokens(name):
    golden, _ = arrays(name)
    frames, k, _ = golden["out_tokens"].shape
    attention = golden["in_attn"].flatten()
    packed = compress(golden["in_x"][None], budget=[[k] * frames], method="holitom", most=1, attention=attention)
    assert torch.equal(packed.values.view_as(golden["out_tokens"]), golden["out_tokens"])
    assert torch.equal(packed.positions[:, 2].view(frames, k), golden["out_pos"])


@pytest.mark.parametrize("name", named("holitom_density_merge"))
def test_holitom_of_contextual_tokens(name):
    golden, params = arrays(name)
    settings = {"contextual": 1.0, "blend": params["beta"], "neighbours": params["knn"]}
    packed = compress(golden["in_x"][None, None], budget=params["clusters"], method="holitom", **settings)
    assert torch.equal(packed.index, golden["out_pos"])
    assert torch.allclose(packed.values, golden["out_tokens"], atol=1e-5)
