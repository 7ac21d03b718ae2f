"""Installs the built wheel beside the oldest and the newest torch and runs the contract tests on it there:
compat.py DIST. Downloads gigabytes into build/compat/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHES = ["torch==2.10.0", "torch"]
TESTS = ["tests/test_contract.py", "-k", "test_cpu or errors or gradients or schema or opcheck or compiles"]


def main(dist: str) -> None:
    wheel = next(Path(dist).resolve().glob("*manylinux*.whl"))
    for torch in TORCHES:
        folder = ROOT / "build" / "compat" / torch.replace("==", "-")
        python = folder / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        packages = [torch, "numpy", "pytest", "pytest-xdist", "hypothesis"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel], check=True)
        options = ["-q", "-n", "2", "-p", "no:cacheprovider", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml"]
        print(f"--- {torch}", flush=True)
        command = [python, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", *options, *TESTS]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONSAFEPATH": "1"})


if __name__ == "__main__":
    main(*sys.argv[1:])
