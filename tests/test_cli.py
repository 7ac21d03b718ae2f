"""The command line on real files: what it writes, and one sentence for whatever is wrong."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import vtok
from vtok import cli, follow, info, trial, video
from vtok.draw import DIM, Grid, draw, preview, residuals, spread

from rooms import ROOT

PATCH = 16


def moving_square(frames=12, height=48, width=64, seed=0):
    """A white square crosses a static texture."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(40, 180, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    clip = np.repeat(np.repeat(texture, 4, 0), 4, 1)[None, :height, :width].repeat(frames, 0)
    side = max(1, height // 4)
    for t in range(frames):
        left = t * (width - side) // max(1, frames - 1)
        clip[t, height // 3 : height // 3 + side, left : left + side] = 255
    return clip


def save(path, clip, rate=12, codec="ffv1", pix_fmt="bgr0", pts=None, **options):
    """A video file of RGB frames; lossless unless another codec is asked for."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        for i, picture in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path, fps="1000", size=448, patch=PATCH):
    return video.read(Path(path), fps=Fraction(fps), size=size, patch=patch)


def vtok_run(capfd, *arguments):
    """Exit code, stdout and stderr of ``vtok ...``, in this process."""
    code = cli.run([str(a) for a in arguments])
    said = capfd.readouterr()
    return code, said.out, said.err


def process(*arguments, code=None, cwd=None):
    """``python -m vtok ...``, or Python code, in a process of its own, on a terminal that spells ASCII alone."""
    command = ["-m", "vtok", *map(str, arguments)] if code is None else ["-c", code]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=cwd, env=environment, check=False
    )


@pytest.fixture
def clip(tmp_path):
    return save(tmp_path / "square.mkv", moving_square())


# Decoding


def test_decodes_every_pixel(tmp_path):
    frames = moving_square(5)
    got = read(save(tmp_path / "a.mkv", frames))
    assert np.array_equal(got.frames.numpy(), frames)
    assert got.times == pytest.approx([i / 12 for i in range(5)], abs=1e-3)
    assert (got.width, got.height, got.decoded, got.problem) == (64, 48, 5, None)


def numbered(frames, side=16):
    """Each frame's grey value is its number."""
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, side, side, 3))


@pytest.mark.parametrize(
    "rate, fps, want",
    [
        (30, "6", [0, 5, 10, 15, 20, 25]),  # 10/30 s is stored as 0.333 and still is the second slot
        (30, "0.5", [0]),
        (30, "30", list(range(30))),
        (30, "1000", list(range(30))),
        (24, "10", [0, 3, 5, 8, 10, 12, 15, 17, 20, 22]),
    ],
)
def test_takes_the_first_frame_of_every_slot(tmp_path, rate, fps, want):
    got = read(save(tmp_path / "a.mkv", numbered(rate), rate), fps)
    assert got.frames[:, 0, 0, 0].tolist() == want


def test_goes_by_timestamps_not_by_counting(tmp_path):
    got = read(save(tmp_path / "a.mkv", numbered(5), 30, pts=[0, 100, 200, 1500, 1600]), "2")
    assert got.frames[:, 0, 0, 0].tolist() == [0, 3]
    assert got.times == pytest.approx([0, 1.5])


def test_long_gop(tmp_path):
    frames = moving_square(60, 64, 256)
    got = read(save(tmp_path / "a.mp4", frames, 30, "mpeg4", "yuv420p", g=600, b=20_000_000), "5")
    away = (got.frames.float()[:, None] - torch.from_numpy(frames).float()).abs().mean((2, 3, 4))
    assert away.argmin(1).tolist() == list(range(0, 60, 6))


@pytest.mark.parametrize("height, width", [(53, 75), (17, 16), (16, 333), (90, 160)])
def test_crops_around_the_centre(tmp_path, height, width):
    frames = moving_square(3, height, width)
    got = read(save(tmp_path / "a.mkv", frames))
    top, left = height % PATCH // 2, width % PATCH // 2
    want = frames[:, top : top + height // PATCH * PATCH, left : left + width // PATCH * PATCH]
    assert np.array_equal(got.frames.numpy(), want)


@pytest.mark.parametrize(
    "height, width, size, patch, want",
    [
        (720, 1280, 448, 16, (240, 448)),
        (480, 640, 320, 14, (238, 308)),
        (100, 100, 8, 14, (14, 14)),
        (6, 9, 448, 16, (16, 16)),
    ],
)
def test_scales_to_whole_patches(tmp_path, height, width, size, patch, want):
    got = read(save(tmp_path / "a.mkv", moving_square(2, height, width)), size=size, patch=patch)
    assert tuple(got.frames.shape[1:3]) == want


def test_shows_a_phone_video_upright(tmp_path):
    frames = moving_square(2, 32, 64)
    path = save(tmp_path / "a.mp4", frames, 12, "mpeg4", "yuv420p", qscale=1)
    upright = read(path).frames
    one, minus = (1 << 16).to_bytes(4, "big"), (0xFFFF0000).to_bytes(4, "big")
    still, turned = [one, bytes(12), one], [bytes(4), one, bytes(4), minus, bytes(4)]
    data = path.read_bytes()
    track = data.index(b"tkhd")
    at = data.index(b"".join(still), track)
    path.write_bytes(data[:at] + b"".join(turned) + data[at + 20 :])  # the matrix of a quarter turn clockwise
    assert np.array_equal(read(path).frames.numpy(), np.rot90(upright.numpy(), -1, (1, 2)))


# The picture


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


# Rebuilding


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


# Outputs, whole or not at all


def test_save_tokens(tmp_path, capfd, clip):
    from safetensors import safe_open

    code, _, _ = vtok_run(capfd, "compress", clip, "--budget", 20, "--save-tokens", "--out", tmp_path / "out")
    assert code == 0
    with safe_open(str(tmp_path / "out" / "tokens.safetensors"), "pt") as file:
        assert file.get_tensor("values").shape == (20, 768)


@pytest.mark.parametrize("method", ["grt", "rlt", "dtd_pixel", "temporal_merge"])
@pytest.mark.parametrize("amount", [["--keep", "25%"], ["--threshold", "0.01"]], ids=" ".join)
def test_other_kinds_of_methods(tmp_path, capfd, clip, method, amount):
    code, text, _ = vtok_run(capfd, "compress", clip, "--method", method, *amount, "--out", tmp_path / "out")
    assert code == 0 and f"PSNR, {method}" in text
    assert (tmp_path / "out" / "sheet.png").exists()


@pytest.mark.parametrize(
    "method, spelled, options",
    [
        ("grt", ["metric=l1", "search=3", "bias=0.5"], {"metric": "l1", "search": 3, "bias": 0.5}),
        ("optimal", ["exact=true"], {"exact": True}),
        ("random", ["seed=7"], {"seed": 7}),
    ],
)
def test_options_of_the_method(tmp_path, capfd, method, spelled, options):
    """What the shell spells is what Python says; what a search found is rebuilt by its vectors."""
    texture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    clip = save(tmp_path / "pan.mkv", np.stack([texture[:48, 2 * t : 2 * t + 64] for t in range(12)]))
    given = ["--option", *" --option ".join(spelled).split(), "--budget", 30, "--fps", 1000, "--out", tmp_path / "out"]
    code, said, _ = vtok_run(capfd, "compress", clip, "--method", method, *given)
    frames, device = read(clip).frames, torch.device("cpu")
    want, plain = (trial.run(frames, PATCH, {"budget": 30, **o}, method, device).psnr[method] for o in (options, {}))
    assert code == 0 and f"PSNR, {method}" in said and f"{want:.2f} dB" in said
    assert method == "optimal" or abs(want - plain) > 0.01
    assert method != "grt" or want > plain + 3


@pytest.mark.parametrize("method", ["fastvid", "flashvid", "prunevid", "holitom"])
def test_methods_of_windows(tmp_path, capfd, clip, method):
    code, text, _ = vtok_run(capfd, "compress", clip, "--method", method, "--keep", "25%", "--out", tmp_path / "out")
    assert code == 0 and f"PSNR, {method}" in text


@pytest.mark.parametrize(
    "method, amount",
    [
        ("grt", {"threshold": 0.05}),
        ("grt", {"threshold": 4.0, "reference": "previous", "search": 3}),
        ("evs", {"budget": 40}),
        ("rlt", {"budget": 40}),
    ],
)
def test_a_stream_in_chunks_is_the_clip(monkeypatch, clip, method, amount):
    monkeypatch.setattr(follow, "CHUNK", 4)
    settings = {"fps": Fraction(10), "size": 448, "patch": PATCH}
    account = follow.Account()
    pieces = list(
        follow.follow(
            clip, method=method, amount=amount, device=torch.device("cpu"), account=account,
            progress=lambda done, total: None, **settings,
        )
    )  # fmt: skip
    whole = read(clip, **settings)
    frames = torch.cat([piece.frames for piece in pieces])
    assert torch.equal(frames, whole.frames) and account.frames == len(whole.times) > 8
    assert account.decoded == whole.decoded
    if "threshold" in amount:
        result = trial.run(whole.frames, PATCH, amount, method, torch.device("cpu"))
        assert torch.equal(torch.cat([piece.rebuilt for piece in pieces]), result.rebuilt)
        assert account.rows == result.rows and account.psnr == pytest.approx(result.psnr[method])
        added = residuals(whole.frames, result.rebuilt, result.packed, patch=PATCH)
        assert torch.equal(torch.cat([piece.added for piece in pieces]), added)
    else:
        assert account.rows == sum(min(40, len(p.frames) * account.tokens // account.frames) for p in pieces)


def test_a_method_keeps_its_own_budget_unless_told(tmp_path, capfd, clip):
    arguments = ["compress", clip, "--fps", 1000, "--method", "residualvit", "--out"]
    code, said, _ = vtok_run(capfd, *arguments, tmp_path / "own")
    assert code == 0 and f"rows out                 {4 * 12 + 8 * 2}" in said  # 4 frames of 12 patches, 8 cut to 2
    code, said, _ = vtok_run(capfd, *arguments, tmp_path / "told", "--budget", 30)
    assert code == 0 and "rows out                 30" in said


def test_the_sheet_of_a_long_stream_stays_one_page():
    account, size = follow.Account(), (8, 8)
    for _ in range(40):
        frames = torch.zeros(7, 8, 8, 3, dtype=torch.uint8)
        packed = vtok.compress(torch.zeros(1, 7, 4, 3), budget=9, method="uniform")
        clip = video.Clip(frames, [0.0] * 7, *size, 7)
        account.add(clip, packed, follow.Piece(frames, frames, frames))
    assert account.frames == 280 and len(account.cells) == 280 // account.step + 1 <= follow.CELLS
    assert {picture.untyped_storage().nbytes() for *_, picture in account.cells} == {8 * 8 * 3}


def test_stream_writes_the_pictures(tmp_path, capfd, clip):
    code, text, _ = vtok_run(
        capfd, "compress", clip, "--stream", "--method", "grt", "--threshold", "0.1", "--out", tmp_path / "out"
    )
    assert code == 0 and "frames a second" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"sheet.png", "preview.mp4"}


@pytest.mark.parametrize("fps", ["1000", "23.97602397", "3"])
@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_the_preview_plays_as_long_as_the_clip(tmp_path, capfd, stream, fps):
    path = save(tmp_path / "a.mkv", moving_square(40), 12)
    code, _, complaint = vtok_run(capfd, "compress", path, *stream, "--fps", fps, "--out", tmp_path / "out")
    assert (code, complaint) == (0, "")
    with av.open(str(tmp_path / "out" / "preview.mp4")) as container:
        seconds = container.duration / 1_000_000
    assert seconds == pytest.approx(40 / 12, rel=0.1)


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


def test_existing_outputs_stay_without_force(tmp_path, capfd, clip):
    out = tmp_path / "out"
    out.mkdir()
    (out / "preview.mp4").write_text("mine")
    code, _, complaint = vtok_run(capfd, "compress", clip, "--out", out)
    assert code == 2 and "--force replaces it" in complaint
    assert [p.name for p in out.iterdir()] == ["preview.mp4"] and (out / "preview.mp4").read_text() == "mine"
    assert vtok_run(capfd, "compress", clip, "--out", out, "--force")[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["preview.mp4", "sheet.png"]
    assert (out / "preview.mp4").stat().st_size > 100


@pytest.mark.parametrize("error", [video.VideoError("the encoder broke"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_nothing_behind(tmp_path, capfd, monkeypatch, clip, existing, error):
    def broken(path, frames, rate):
        path.write_bytes(b"half")
        raise error

    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "sheet.png").write_text("mine")
    monkeypatch.setattr(video, "write", broken)
    code, _, complaint = vtok_run(capfd, "compress", clip, "--out", out, "--force")
    assert code == 2 and one_sentence(complaint)
    assert existing == out.exists()
    assert not existing or (
        [p.name for p in out.iterdir()] == ["sheet.png"] and (out / "sheet.png").read_text() == "mine"
    )


# Bad input


def one_sentence(complaint):
    lines = complaint.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("vtok: ") and "Traceback" not in complaint


def write_bytes(name, data):
    return lambda folder: (folder / name).write_bytes(data) and folder / name


def wav(folder):
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    return folder / "sound.wav"


def y4m(header, data=b""):
    return write_bytes("clip.y4m", b"YUV4MPEG2 " + header + b" F25:1 C420\n" + data)


BAD_FILES = {
    "missing": (lambda folder: folder / "nothing.mp4", "does not exist"),
    "directory": (lambda folder: folder, "a directory"),
    "device": (lambda folder: Path("/dev/zero"), "not a regular file"),
    "empty": (lambda folder: (folder / "empty.mp4").touch() or folder / "empty.mp4", "FFmpeg can't read"),
    "noise": (write_bytes("noise.mp4", random.Random(0).randbytes(5000)), "expected a video"),
    "text": (write_bytes("text.txt", b"hello\n" * 200), "no video stream"),
    "url": (lambda folder: Path("http://example.invalid/a.mp4"), "does not exist"),
    "playlist": (write_bytes("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://example.invalid/a.ts\n"), "expected a video"),
    "audio only": (wav, "no video stream"),
    "no frames": (y4m(b"W16 H16"), "it has none"),
    "half a frame": (y4m(b"W16 H16", b"FRAME\n" + bytes(100)), "it has none"),
    "absurd": (y4m(b"W20000 H300", b"FRAME\n" + bytes(9_000_000)), "of at most"),
    "absurd for FFmpeg": (y4m(b"W30000 H30000", b"FRAME\n"), "FFmpeg can't read"),
    "thin": (y4m(b"W16000 H2", b"FRAME\n" + bytes(48_000)), "nearer to a square"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_one_sentence(tmp_path, capfd, kind):
    make, words = BAD_FILES[kind]
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    code, said, complaint = vtok_run(capfd, "compress", path, "--out", tmp_path / "out")
    assert code == 2 and said == "" and one_sentence(complaint) and words in complaint
    assert not (tmp_path / "out").exists()


BAD_OPTIONS = [
    (["--budget", "0"], "--budget"),
    (["--budget", "-3"], "--budget"),
    (["--budget", "2.5"], "--budget"),
    (["--budget", "many"], "--budget"),
    (["--budget", "10", "--keep", "25%"], "got --budget and --keep"),
    (["--keep", "10%", "--threshold", "3"], "got --keep and --threshold"),
    (["--threshold", "much"], "expected --threshold to be a number"),
    (["--threshold", "-1", "--method", "grt"], "threshold"),
    (["--stream", "--save-tokens"], "expected --stream without --save-tokens"),
    (["--stream", "--encoder", "x"], "expected --stream without --encoder"),
    (["--keep", "0"], "--keep"),
    (["--keep", "101%"], "--keep"),
    (["--keep", "nan"], "--keep"),
    (["--keep", "1e999999999"], "--keep"),
    (["--keep", ""], "--keep"),
    (["--method", "magic"], "evs"),
    (["--option", "compat"], "expected --option NAME=VALUE"),
    (["--option", "compat=vllm", "--option", "compat=vllm"], "each name once"),
    (["--option", "compat=abc"], "abc"),
    (["--option", "metric=l1"], "an --option of 'evs' among (compat)"),
    (["--method", "grt", "--option", "forced=true"], "among (bias, metric, reference, refresh, search)"),
    (["--method", "grt", "--option", "search=1.5"], "expected --option search to be of type int, got '1.5'"),
    (["--method", "grt", "--option", "bias=nan"], "expected --option bias to be of type float, got 'nan'"),
    (["--method", "optimal", "--option", "exact=1"], "expected --option exact to be of type bool, got '1'"),
    (["--device", "tpu"], "--device"),
    (["--device", "meta"], "--device"),
    (["--device", "cuda:99"], "--device"),
    (["--fps", "0"], "--fps"),
    (["--fps", "inf"], "--fps"),
    (["--size", "0"], "--size"),
    (["--size", "a"], "--size"),
    (["--patch", "-1"], "--patch"),
    (["--out", "/proc/vtok"], "/proc/vtok"),
    (["--out", __file__], "expected a folder"),
    (["--loud"], "--loud"),
]


@pytest.mark.parametrize("options, words", BAD_OPTIONS, ids=[" ".join(o) for o, _ in BAD_OPTIONS])
def test_bad_options_are_one_sentence(tmp_path, capfd, monkeypatch, clip, options, words):
    monkeypatch.chdir(tmp_path)
    code, said, complaint = vtok_run(capfd, "compress", clip, *options)
    assert code == 2 and said == "" and one_sentence(complaint) and words in complaint
    assert [p.name for p in tmp_path.iterdir()] == ["square.mkv"]


def test_bad_commands_are_one_sentence(capfd):
    for arguments in (["compress"], ["fly"], ["--loud"], ["info", "more"]):
        code, _, complaint = vtok_run(capfd, *arguments)
        assert code == 2 and one_sentence(complaint)


def test_too_long_a_clip_is_one_sentence(capfd, monkeypatch, clip):
    monkeypatch.setattr(video, "MAX_BYTES", 100_000)
    code, _, complaint = vtok_run(capfd, "compress", clip, "--fps", "30")
    assert code == 2 and one_sentence(complaint) and "lower --fps or --size" in complaint


def test_a_budget_beyond_the_clip_keeps_it_all(tmp_path, capfd, clip):
    code, said, _ = vtok_run(capfd, "compress", clip, "--budget", 10**6, "--out", tmp_path / "out")
    assert code == 0 and "inf dB" in said


def test_names_that_mean_something_elsewhere(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mkv", "[red]a.mkv", "%03d.mkv", "-v.mkv", "concat:a.mkv"):
        save(tmp_path / "plain.mkv", moving_square(2)).rename(tmp_path / name)
        code, said, complaint = vtok_run(capfd, "compress", "--", name)
        assert (code, complaint) == (0, "") and f"{Path(name).stem}-vtok/sheet.png" in said


FUZZ = """
import faulthandler, random, sys, time
from fractions import Fraction
from pathlib import Path
from vtok import video
faulthandler.enable()
for seed in range(36):
    rng = random.Random(seed)
    data = bytearray(Path(sys.argv[1 + seed % 3]).read_bytes())
    if seed % 4 == 0:
        del data[rng.randrange(len(data)):]
    for _ in range(rng.choice([1, 8, 64])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path = Path(sys.argv[4])
    path.write_bytes(data)
    start = time.monotonic()
    try:
        clip = video.read(path, fps=Fraction(30), size=64, patch=16)
        assert clip.frames.shape[0] == len(clip.times) > 0
        verdict = "read"
    except video.VideoError as error:
        assert len(str(error).splitlines()) == 1
        verdict = "refused"
    assert time.monotonic() - start < 20
    print(verdict)
"""


def test_damaged_files_neither_crash_nor_hang(tmp_path):
    files = [
        save(tmp_path / "a.mp4", moving_square(20), 12, "mpeg4", "yuv420p"),
        save(tmp_path / "b.mkv", moving_square(20)),
        save(tmp_path / "c.avi", moving_square(20), 12, "mjpeg", "yuvj420p"),
    ]
    argv = ["fuzz", *map(str, files), str(tmp_path / "damaged")]
    done = process(code=f"import sys; sys.argv = {argv!r}\n{FUZZ}")
    assert done.returncode == 0, done.stderr
    verdicts = done.stdout.split()
    assert len(verdicts) == 36 and set(verdicts) == {"read", "refused"}


def test_a_decoder_that_gives_up_leaves_the_frames_before(tmp_path, capfd, monkeypatch, clip):
    whole = video._timed

    def broken(*arguments):
        for number, frame in enumerate(whole(*arguments)):
            if number == 3:
                raise av.error.InvalidDataError(1, "Invalid data")
            yield frame

    monkeypatch.setattr(video, "_timed", broken)
    code, said, complaint = vtok_run(capfd, "compress", clip, "--fps", "12", "--out", tmp_path / "out")
    assert code == 0 and "3 of 3" in said
    assert one_sentence(complaint) and "stopped after 3 frames: Invalid data" in complaint


def test_a_truncated_video_gives_the_frames_before(tmp_path, capfd):
    path = save(tmp_path / "a.mkv", moving_square(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, said, _ = vtok_run(capfd, "compress", path, "--fps", "12", "--out", tmp_path / "out")
    assert code == 0 and "of 20" not in said


# Processes


def test_processes_exit_with_2_and_a_sentence(tmp_path):
    done = process("compress", tmp_path / "nothing.mp4", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("vtok: expected a video file") and "Traceback" not in done.stderr


def test_the_default_folder_is_named_after_the_video(tmp_path, clip):
    odd = "\N{SNOWMAN}\udcff"  # the second half is no Unicode
    done = process("compress", clip.rename(tmp_path / f"{odd}.mkv"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / f"{odd}-vtok").iterdir()) == ["preview.mp4", "sheet.png"]


WITHOUT = """
import runpy, sys
sys.modules[{!r}] = None
sys.argv = ["vtok", {!r}]
runpy.run_module("vtok", run_name="__main__")
"""


def test_without_the_extra():
    done = process(code=WITHOUT.format("av", "compress"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith('pip install "vtok[cli]"')


def test_info_without_the_extra():
    done = process(code=WITHOUT.format("rich", "info"))
    assert done.returncode == 0 and vtok.__version__ in done.stdout and "pack" in done.stdout


# What runs here


def test_info(capfd, monkeypatch):
    code, said, _ = vtok_run(capfd, "info")
    assert code == 0
    for fact in (vtok.__version__, torch.__version__, f"cpu {vtok.backend_of('pack')}"):
        assert fact in said

    def broken(*arguments):
        raise RuntimeError("out of order\nand more")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr(info, "backend_of", broken)
    monkeypatch.setattr(info, "cuda_code", broken)
    code, said, _ = vtok_run(capfd, "info")
    assert code == 0 and said.count("unknown: RuntimeError: out of order") >= 3 and "and more" not in said


def test_cuda_code_is_read_from_fat_binaries(tmp_path):
    def entry(kind, arch, payload):
        header = kind.to_bytes(2, "little") + bytes(2) + (64).to_bytes(4, "little") + payload.to_bytes(8, "little")
        return header + bytes(12) + arch.to_bytes(4, "little") + bytes(32) + bytes(payload)

    entries = entry(2, 80, 40) + entry(2, 90, 8) + entry(1, 90, 16)
    binary = bytes(100) + bytes.fromhex("50ed55ba") + b"\1\0\x10\0" + len(entries).to_bytes(8, "little") + entries
    (tmp_path / "a.so").write_bytes(binary + bytes(50) + binary[:104])
    with pytest.raises(Exception):  # noqa: B017  a header cut short: report() says so
        info.cuda_code(tmp_path / "a.so")
    (tmp_path / "a.so").write_bytes(binary + bytes(50))
    assert info.cuda_code(tmp_path / "a.so") == ["sm_80", "compute_90", "sm_90"]


def test_methods(capfd):
    code, said, _ = vtok_run(capfd, "methods")
    assert code == 0 and {"evs", "uniform", "random"} <= set(said.split())
