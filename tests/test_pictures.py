"""Sheets, previews and clips rebuilt: what was dropped is dimmed, and nothing else."""

from __future__ import annotations

import math
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import vtok
from vtok import trial, video
from vtok.draw import DIM, HEADER, PAPER, Grid, draw, preview, residuals, sheet, spread

from clips import PATCH, moving_square, read, save, vtok_run


@pytest.mark.parametrize("frames, fps", [(1, "2"), (12, "1000"), (30, "1000")])
def test_writes_a_sheet_and_a_preview(tmp_path, capfd, frames, fps):
    path = save(tmp_path / "a.mkv", moving_square(frames))
    code, said, complaint = vtok_run(capfd, "compress", path, "--fps", fps, "--out", tmp_path / "out")
    assert (code, complaint) == (0, "")
    total = frames * 12
    for fact in (f"{frames} of {frames}, 64x48", f"{total:,} of 768 numbers", f"{total // 4:,}", "uniform frames"):
        assert fact in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["preview.mp4", "sheet.png"]
    with av.open(str(tmp_path / "out" / "preview.mp4")) as container:
        pictures = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(pictures) == frames
    assert panels(pictures[0]) == 3


def test_writes_mpeg4_where_there_is_no_h264(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    frames = torch.from_numpy(moving_square(7))
    video.write(tmp_path / "a.mp4", preview({"one": frames}), Fraction(12))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        pictures = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(pictures) == 7
    scale = 320 // 64
    shown = pictures[6][24 : 24 + 48 * scale : scale, 12 : 12 + 320 : scale].astype(float)
    assert np.abs(shown - frames[6].numpy()).mean() < 12


def panels(picture):
    """Stretches of bright columns, the paper between them dark."""
    bright = picture[30:].max(2).max(0) > 35
    return int(np.count_nonzero(np.diff(bright.astype(int)) == 1))


def test_a_narrow_sheet_is_as_wide_as_its_lines():
    title, facts = "a clip of one frame", "the share of each method  ·  " * 4

    def written(cells):
        page = sheet(torch.zeros(cells, 48, 64, 3, dtype=torch.uint8), [("", "")] * cells, title, facts)
        return Image.fromarray((np.asarray(page)[:HEADER] != PAPER).any(2)).getbbox()

    assert written(1) == written(24)


def test_sheet_dims_what_was_dropped_and_nothing_else(tmp_path, capfd, clip):
    code, _, _ = vtok_run(capfd, "compress", clip, "--fps", 1000, "--keep", "30%", "--out", tmp_path / "out")
    assert code == 0
    frames = read(clip).frames
    packed = vtok.compress(trial.patchify(frames, PATCH), budget=Fraction(3, 10))
    kept = packed.mask.view(12, 3, 4)
    assert 0 < kept[1:].sum() < kept[1:].numel()
    page = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    grid = Grid.of(12, 48, 64)
    assert page.shape[:2] == grid.size[::-1]
    scale = grid.width // 64
    for t in range(12):
        x, y = grid.corner(t)
        for row, column in np.ndindex(3, 4):
            cell = page[y : y + grid.height : scale, x : x + grid.width : scale]
            got = cell[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].astype(float)
            want = frames[t, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].numpy()
            if kept[t, row, column]:
                assert np.array_equal(got, want)
            else:
                assert np.ptp(got, axis=2).max() == 0, "a dropped patch is grey"
                assert got.mean() < 0.4 * want.mean(), "a dropped patch is dark"


def test_draw_needs_tokens_that_tile_the_frames():
    packed = vtok.compress(torch.randn(1, 4, 2, 3, 8), budget=6)
    frames = torch.full((4, 32, 48, 3), 200, dtype=torch.uint8)
    shown = draw(frames, packed)
    assert (shown == 200).all(3).sum() == 6 * PATCH * PATCH
    assert torch.equal(shown, vtok.draw(frames, packed, patch=16))
    pairs = draw(torch.cat([frames, frames]), packed, patch=16)  # two frames to a token
    assert torch.equal(pairs[::2], shown) and torch.equal(pairs[1::2], shown)
    for wrong in (frames[:3], frames[:, :31], frames.float(), frames[..., :2]):
        with pytest.raises(ValueError, match="expected"):
            draw(wrong, packed)


def test_edges_say_how_many_tokens_a_merged_patch_stands_for():
    frames = torch.randint(0, 256, (8, 32, 48, 3), dtype=torch.uint8)
    frames[:, :16, :16] = frames[:1, :16, :16].clone()  # one site stays the same, and is one run
    packed = vtok.compress(trial.patchify(frames, 16), budget=41, method="temporal_merge")
    assert packed.weight[:6].tolist() == [8, 1, 1, 1, 1, 1]
    shown = vtok.draw(frames, packed, patch=16)
    accent = torch.tensor([255, 176, 64], dtype=torch.uint8)
    assert (shown[0, 0, :16] == accent).all() and (shown[0, :16, 0] == accent).all()
    assert torch.equal(shown[0, 1:16, 1:16], frames[0, 1:16, 1:16])
    assert torch.equal(shown[:, 16:], frames[:, 16:])  # what stands for itself has no edge


def test_spread_has_the_first_and_the_last():
    assert spread(5) == [0, 1, 2, 3, 4]
    assert spread(1000)[0] == 0 and spread(1000)[-1] == 999 and len(set(spread(1000))) == 24


def test_patchify_is_undone_by_unpatchify():
    frames = torch.from_numpy(moving_square(3))
    tokens = trial.patchify(frames, PATCH)
    assert tokens.shape == (1, 3, 3, 4, 768) and tokens.min() >= -1 and tokens.max() <= 1
    red = frames[1, 16:32, 32:48, 0].flatten().float() / 127.5 - 1
    assert torch.equal(tokens[0, 1, 1, 2, :256], red)
    packed = vtok.compress(tokens, budget=36)
    assert torch.equal(trial.unpatchify(packed, packed.values, frames.shape, PATCH), frames)


def test_evs_rebuilds_a_moving_square_better_than_the_baselines(clip):
    result = trial.run(read(clip).frames, PATCH, {"budget": Fraction(1, 3)}, "evs", torch.device("cpu"))
    assert result.psnr["evs"] > result.psnr["uniform frames"] + 3
    assert result.psnr["evs"] > result.psnr["random rows"] + 3
    assert {"topk", "pack"} <= set(result.backends)
    assert result.backends["pack"] == vtok.backend_of("pack")


def test_evs_spends_its_rows_on_the_scene_cut():
    frames = torch.from_numpy(np.concatenate([moving_square(1).repeat(4, 0), moving_square(1, seed=1).repeat(4, 0)]))
    result = trial.run(frames, PATCH, {"budget": 24}, "evs", torch.device("cpu"))
    assert result.packed.mask.view(8, 12).sum(1).tolist() == [12, 0, 0, 0, 12, 0, 0, 0]
    assert result.psnr["evs"] == math.inf


@pytest.mark.parametrize("method, count", [("grt", 4), ("rlt", 4), ("residualvit", 4), ("dtd_pixel", 4), ("evs", 3)])
@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_a_gates_preview_shows_residuals(tmp_path, capfd, clip, stream, method, count):
    code, _, _ = vtok_run(capfd, "compress", clip, *stream, "--method", method, "--out", tmp_path / "out")
    assert code == 0
    with av.open(str(tmp_path / "out" / "preview.mp4")) as container:
        assert panels(next(container.decode(video=0)).to_ndarray(format="rgb24")) == count


def test_residuals_are_what_each_kept_patch_adds():
    frames = torch.randint(0, 256, (5, 16, 32, 3), dtype=torch.uint8)
    frames[:, :, :16] = frames[:1, :, :16].clone()
    packed = vtok.gate_patches(trial.normalised(frames), patch=16, threshold=0.0)
    rebuilt = trial.unpatchify(packed, packed.values, frames.shape, 16)
    added = residuals(frames, rebuilt, packed, patch=16)
    assert torch.equal(added[0], frames[0]) and (added[1:, :, :16] == round(128 * DIM)).all()
    moved = ((frames[1:, :, 16:].int() - frames[:-1, :, 16:].int()) / 2 + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(added[1:, :, 16:], moved)
