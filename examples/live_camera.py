"""A camera, or a file played as one: patches that moved go on to a model, for as long as frames come.

    python examples/live_camera.py /dev/video0 --format v4l2
    python examples/live_camera.py clip.mp4

The stream keeps one frame of state and nothing else; positions count from the first frame.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import av
import numpy as np
import torch

import vtok

PATCH, CHUNK = 16, 8


def chunks(source: str, form: str | None) -> Iterator[torch.Tensor]:
    """uint8 [1, T, 3, H, W], CHUNK frames at a time, cropped to whole patches."""
    with av.open(source, format=form) as container:
        frames: list[np.ndarray] = []
        for frame in container.decode(video=0):
            picture = frame.to_ndarray(format="rgb24")
            height, width = (side // PATCH * PATCH for side in picture.shape[:2])
            frames.append(picture[:height, :width])
            if len(frames) == CHUNK:
                yield torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None]
                frames = []
        if frames:
            yield torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("source")
    options.add_argument("--format", help="FFmpeg's name of a capture device: v4l2, avfoundation, dshow")
    options.add_argument("--threshold", type=float, default=300.0, help="distance of a patch of 0 to 255 pixels")
    given = options.parse_args()

    halves = [0.5, 0.5, 0.5]
    stream = vtok.Stream("grt", patch=PATCH, threshold=given.threshold, refresh=300, mean=halves, std=halves)
    for frames in chunks(given.source, given.format):
        packed = stream.push(frames).trim()
        rows, last = packed.values, packed.positions[-1, 0].item() if len(packed.index) else "-"
        # rows [K, 3·16·16] and packed.positions [K, 3] are what a vision encoder takes from here.
        print(f"{frames.shape[1]} frames: {rows.shape[0]} of {packed.layout.total} patches, the last in frame {last}")


if __name__ == "__main__":
    main()
