"""Bugs planted on purpose. tests/mutants/<name>.py lists MUTANTS, the most telling one first; each turns a test red,
of tests/ops/test_<name>.py and the contract tests of that op, or of tests/test_<name>.py where there is no such op.

How it is judged follows from the file that is broken: a .cuh through the host build, other C++ through the library,
triton_kernels/ in the interpreter, Python as it is.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rooms import ROOT

MEMORY = 12 << 30  # bytes of addresses


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # must occur exactly once
    new: str
    sanitize: bool = False  # seen by ASan or UBSan; the outputs are right

    def __str__(self) -> str:
        return self.name

    @property
    def build(self) -> str | None:
        """The folder of the build that the file goes into."""
        if self.file.endswith(".cuh"):
            return "build/host-asan" if self.sanitize else "build/host"
        return None if self.file.endswith(".py") else "build/cmake"


def all_mutants() -> list[tuple[str, Mutant]]:
    rooms = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("mutant", "test_mutants"))
    return [(op, mutant) for op in rooms for mutant in importlib.import_module(op).MUTANTS]


def run(*command: str, cwd: Path, limits: bool = False, **env: str) -> subprocess.CompletedProcess:
    """With ``limits``, for what a mutant may do for ever: ten minutes, and memory where no sanitizer maps its own."""
    if limits:
        command = ("timeout", "--kill-after=10", "600", *command)
    bound = limit_memory if limits and "sanitized" not in " ".join(command) else None
    environment = {**os.environ, **env}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, preexec_fn=bound)


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


class Tree:
    """A copy of the checkout to break things in."""

    def __init__(self, root: Path):
        self.root = root
        listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT)
        assert listed.returncode == 0, listed.stderr
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        for inside in ("triton_kernels", "bench"):  # what an editable install does
            (root / "vtok" / inside).symlink_to(Path("..") / inside)

    def build(self, op: str, folder: str) -> None:
        """One room of the library or of the host module, with the settings of the checkout's own build."""
        host = folder != "build/cmake"
        options = ["-DVTOK_HOST_MODULE=ON"] if host else ["-DVTOK_CUDA=off"]
        options += ["-DVTOK_SANITIZE=address,undefined"] if folder.endswith("asan") else []
        options += [f"-DVTOK_TORCH={package('torch')}", f"-Dpybind11_DIR={package('pybind11')}/share/cmake/pybind11"]
        options += [f"-DVTOK_ROOMS={op}", f"-DPython3_EXECUTABLE={sys.executable}"]
        for command in (["cmake", "-G", "Ninja", "-S", ".", "-B", folder, *options], ["cmake", "--build", folder]):
            done = run(*command, cwd=self.root)
            assert done.returncode == 0, f"a mutant must build\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        if not host:
            shutil.copyfile(self.root / folder / "_C.so", self.root / "vtok" / "_C.so")

    def test(self, op: str, mutant: Mutant, where: Path, *arguments: str) -> subprocess.CompletedProcess:
        """pytest over the tests of the op that see the mutant's file, or over the given ones."""
        folder = str(where / (mutant.build or "build"))
        command = (
            [sys.executable, "tests/sanitized.py", folder] if mutant.sanitize else [sys.executable, "-m", "pytest"]
        )
        room = f"tests/ops/test_{op}.py"
        tests = ["-k", op, "tests/test_contract.py", room] if (ROOT / room).exists() else [f"tests/test_{op}.py"]
        if mutant.file.startswith("triton_kernels/"):
            tests = ["-k", op, "tests/triton"]
        arguments = arguments or tuple(tests)
        marks = ["-m", "host" if mutant.file.endswith(".cuh") else "not host"] if not mutant.sanitize else []
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"]
        options += ["-s"] if mutant.sanitize else []  # a report that ends the process is lost with what was captured
        env = {"VTOK_HOST_DIR": folder}
        if mutant.file.startswith("triton_kernels/"):
            env["TRITON_INTERPRET"] = "1"
        if where != ROOT:  # which is installed
            env["PYTHONPATH"] = str(where)
        return run(*command, *options, *marks, *arguments, cwd=where, limits=True, **env)


def package(name: str) -> str:
    return str(Path(importlib.import_module(name).__file__).parent)


def red_test(output: str) -> str | None:
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.M)
    return found and found[1]


def died(done: subprocess.CompletedProcess) -> bool:
    """Whether a signal ended it, the timeout's included: a broken kernel may crash or never end."""
    return done.returncode < 0 or done.returncode >= 124
