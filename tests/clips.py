"""Clips that the tests make, files of them, and `vtok` run on those."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vtok import cli, video

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


def one_sentence(complaint):
    lines = complaint.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("vtok: ") and "Traceback" not in complaint
