"""The command line on real files: what it writes."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

import vtok
from vtok import follow, info, trial, video
from vtok.draw import residuals

from clips import PATCH, moving_square, one_sentence, process, read, save, vtok_run


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
