"""Every example runs as a script."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rooms import ROOT

SAYS = {"ops_in_forward.py": ["tokens (480, 64), kept [72, 48], rows (120, 64)", "eager equals compiled"]}


def test_every_example_is_here():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_examples(name, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / name)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for words in SAYS[name]:
        assert words in done.stdout
