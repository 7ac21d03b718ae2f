"""Every example runs as a script."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from clips import moving_square, save
from rooms import ROOT

SAYS = {
    "ops_in_forward.py": ["tokens (480, 64), kept [72, 48], rows (120, 64)", "eager equals compiled"],
    "live_camera.py clip.mkv": ["8 frames: 26 of 96 patches, the last in frame 7", "2 frames: 4 of 24 patches"],
    "gated_tower.py": ["3136 of 3136 patches", "100.0% of the whole", " 24.3% of the whole", "equals the plain tower"],
}


def test_every_example_is_here():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(call.split()[0] for call in SAYS)


@pytest.mark.parametrize("call", SAYS)
def test_examples(call, tmp_path):
    save(tmp_path / "clip.mkv", moving_square(10))
    name, *arguments = call.split()
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for words in SAYS[call]:
        assert words in done.stdout
