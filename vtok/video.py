"""Reads and writes video through PyAV. Whatever is wrong with a file is one sentence, a VideoError."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from torch import Tensor

MAX_SIDE = 1 << 14  # pixels; beyond it a header lies more often than not
MAX_PIXELS = 1 << 26  # of one decoded picture
MAX_BYTES = 4 << 30  # of the clip as float32 patches
_BAD_DATA = (av.FFmpegError, ValueError, OSError, MemoryError, OverflowError, ArithmeticError)


class VideoError(ValueError):
    """One sentence about a file that can't be read or written as video."""


@dataclass(frozen=True)
class Clip:
    """The chosen frames of a video, cut to whole patches."""

    frames: Tensor  # uint8 [T, H, W, 3]
    times: list[float]  # seconds since the first frame
    width: int  # of the source, before scaling and cropping
    height: int
    decoded: int  # frames looked at
    problem: str | None = None  # why decoding ended early

    @property
    def rate(self) -> Fraction:
        """Frames per second to play them at, at least one."""
        span = self.times[-1] - self.times[0]
        return max(Fraction(1), Fraction((len(self.times) - 1) / span).limit_denominator(1000)) if span else Fraction(1)


def read(
    path: Path,
    *,
    fps: Fraction,
    size: int,
    patch: int,
    progress: Callable[[float, float | None], None] = lambda seconds, duration: None,
) -> Clip:
    """Decode the first frame of every 1/fps seconds, scaled down to ``size`` at most and cropped to whole patches.

    Frames before damaged data are kept, with the reason in ``Clip.problem``. Raises VideoError: no such file, not a
    video, no frames, a picture or a clip beyond the limits above.
    """
    (clip,) = chunks(path, fps=fps, size=size, patch=patch, progress=progress)
    return clip


def chunks(
    path: Path,
    *,
    fps: Fraction,
    size: int,
    patch: int,
    frames: int | None = None,
    progress: Callable[[float, float | None], None] = lambda seconds, duration: None,
) -> Iterator[Clip]:
    """The same clip, ``frames`` frames at a time, in memory for so many; times count from the first frame of all."""
    pictures: list[np.ndarray] = []
    times: list[float] = []
    source = target = (0, 0)
    decoded, told, slot, problem, start = 0, 0, -1, None, 0.0

    def clip(decoded: int) -> Clip:
        return Clip(torch.from_numpy(np.stack(pictures)), [t - start for t in times], *source, decoded - told, problem)

    with _open(path) as (container, stream):
        duration = container.duration / 1_000_000 if container.duration else None
        try:
            for seconds, frame in _timed(container, stream):
                decoded += 1
                progress(float(seconds), duration)
                wanted = math.floor(seconds * fps)
                if wanted <= slot:
                    continue
                slot = wanted
                if source == (0, 0):
                    source, start = (frame.width, frame.height), float(seconds)
                    target = fit(*source, size, patch, path)
                if len(pictures) == frames:
                    yield clip(decoded - 1)
                    pictures, times, told = [], [], decoded - 1
                pictures.append(_picture(frame, target, patch))
                times.append(float(seconds))
                if len(pictures) * pictures[0].size * 4 > MAX_BYTES:
                    limit = f"a clip of at most {MAX_BYTES >> 30} GiB as float32 patches"
                    raise VideoError(
                        f"expected {limit}, got more in {times[-1]:.1f} s of {str(path)!r}; lower --fps or --size"
                    )
        except VideoError:
            raise
        except _BAD_DATA as error:
            problem = f"decoding stopped after {decoded} frames: {_reason(error)}"
    if not pictures:
        raise VideoError(f"expected a video with frames, got {str(path)!r} without; {problem or 'it has none'}")
    yield clip(decoded)


def fit(width: int, height: int, size: int, patch: int, path: Path | str = "") -> tuple[int, int]:
    """Width and height to scale to: longest side at most ``size``, shortest at least one patch, the shape kept."""
    scale = max(min(1.0, size / max(width, height)), patch / min(width, height))
    scaled = (max(patch, round(width * scale)), max(patch, round(height * scale)))
    if max(scaled) > MAX_SIDE:
        raise VideoError(f"expected frames nearer to a square, got {width}x{height} in {str(path)!r}")
    return scaled


def _picture(frame: av.VideoFrame, target: tuple[int, int], patch: int) -> np.ndarray:
    """RGB, scaled, cropped around the centre to whole patches, turned the way it is shown."""
    picture = frame.reformat(*target, format="rgb24", interpolation="AREA").to_ndarray()
    height, width = (side // patch * patch for side in picture.shape[:2])
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return np.rot90(picture[top : top + height, left : left + width], getattr(frame, "rotation", 0) // 90)


def _timed(container, stream) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Frames with seconds since the first, half a tick added so that rounded timestamps reach their slot."""
    tick = Fraction(stream.time_base or Fraction(1, 1000))
    rate = stream.average_rate or stream.guessed_rate or 25
    start = None
    for number, frame in enumerate(container.decode(stream)):
        seconds = frame.pts * tick if frame.pts is not None else Fraction(number) / Fraction(rate)
        start = seconds if start is None else start
        yield seconds - start + min(tick, 1 / Fraction(rate)) / 2, frame


@contextmanager
def _open(path: Path):
    if not path.exists():
        raise VideoError(f"expected a video file, got {str(path)!r}, which does not exist")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise VideoError(f"expected a video file, got {str(path)!r}, which is {kind}")
    try:  # "file:" and the whitelist: a name with a colon is a name, and a playlist can't reach the network
        container = av.open(f"file:{path}", metadata_errors="replace", options={"protocol_whitelist": "file"})
    except _BAD_DATA as error:
        raise VideoError(f"expected a video, got {str(path)!r}, which FFmpeg can't read: {_reason(error)}") from error
    with container:
        streams = container.streams.video
        if not streams or container.format.name == "tty":  # FFmpeg plays text files as terminals
            raise VideoError(f"expected a video, got {str(path)!r}, which has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(f"expected a video, got {str(path)!r}, in a format that FFmpeg can't decode")
        width, height = stream.width or 0, stream.height or 0
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            limit = f"{MAX_SIDE} pixels a side and {MAX_PIXELS >> 20} Mpixel"
            raise VideoError(f"expected frames of at most {limit}, got {width}x{height} in {str(path)!r}")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.thread_type = "AUTO"
        yield container, stream


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).splitlines()[0]


def write(path: Path, frames: Iterable[np.ndarray], rate: Fraction) -> None:
    """Encode RGB uint8 [H, W, 3] frames, H and W even: H.264 where FFmpeg has it, else MPEG-4."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": "18"} if codec == "libx264" else {"qmin": "2", "qmax": "4"}
    try:
        with av.open(f"file:{path}", "w", format="mp4") as container:
            stream = cast(av.VideoStream, container.add_stream(codec, rate=rate, options=options))
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                if not stream.codec_context.is_open:
                    stream.height, stream.width = frame.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise VideoError(f"expected to write a video to {str(path)!r}, got: {_reason(error)}") from error
