"""What is decoded of a file: every pixel, the right frames, upright and in whole patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clips import PATCH, moving_square, read, save


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
