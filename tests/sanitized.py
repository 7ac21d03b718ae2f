"""Runs pytest over a sanitized host build of the CUDA kernels: sanitized.py FOLDER PYTEST-ARGUMENTS...

Only the tests that use the host build run. Python itself is not sanitized, so the runtime is preloaded; leaks are
Python's own affair. The first finding ends the process with an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environment(folder: str) -> dict[str, str]:
    names = ("libasan.so", "libstdc++.so.6")  # the second one because ASan must see it to intercept exceptions
    found = [subprocess.check_output(["gcc", f"-print-file-name={n}"], text=True).strip() for n in names]
    return {
        **os.environ,
        "VTOK_HOST_DIR": folder,
        "VTOK_HOST_SEEDS": "1",  # the other orders are tried without the sanitizers
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:log_path={folder}/finding",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={folder}/finding",
    }


def main(folder: str, *arguments: str) -> int:
    for old in Path(folder).glob("finding.*"):
        old.unlink()
    command = [sys.executable, "-m", "pytest", "-m", "host", *arguments]
    code = subprocess.run(command, env=environment(folder)).returncode
    for finding in Path(folder).glob("finding.*"):  # pytest swallows what a dying process prints
        print(finding.read_text())
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
