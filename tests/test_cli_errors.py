"""The command line on bad input: one sentence for whatever is wrong, and nothing destroyed."""

from __future__ import annotations

import random
import wave
from pathlib import Path

import av
import pytest

from vtok import video

from clips import moving_square, one_sentence, process, save, vtok_run


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
