"""What `make gpu` runs on a machine with a GPU: builds for its architecture, runs the cases of every op on the device
(CUDA C++, then Triton), measures, and runs the kernels under compute-sanitizer. No network; under ten minutes; a phase
that fails does not stop the others, and the exit status says whether one did. Logs are in build/gpu."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu"
TOTAL_S = 540
PYTHON = sys.executable
DESCRIBE = """import torch, triton
c = torch.cuda.get_device_capability()
print(torch.cuda.get_device_name(), f"{c[0]}{c[1]}", torch.__version__, triton.__version__, torch.version.cuda, sep="|")
"""


@dataclass(frozen=True)
class Phase:
    """One command with its share of the time; `gone` in its output means that the tool does not work here."""

    name: str
    command: list[str]
    limit_s: int
    env: dict[str, str]
    gone: str = ""


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str  # ok, failed, out of time, skipped
    seconds: float
    detail: str


def environment() -> dict[str, str]:
    """This Python's own tools and nvcc on the path; the tree importable."""
    folders = [str(Path(PYTHON).parent), os.environ["PATH"], "/usr/local/cuda/bin"]
    return os.environ | {"PATH": os.pathsep.join(folders), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def describe(env: dict[str, str]) -> dict[str, str]:
    found = subprocess.run([PYTHON, "-c", DESCRIBE], capture_output=True, text=True, env=env)
    if found.returncode:
        sys.exit(f"expected a GPU that torch and Triton can use, got: {found.stderr.strip().splitlines()[-1]}")
    names = ("device", "architecture", "torch", "triton", "cuda")
    return dict(zip(names, found.stdout.strip().splitlines()[-1].split("|"), strict=True))


def pytest(workers: int, *arguments: str) -> list[str]:
    parallel = ["-n", str(workers), "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    return [PYTHON, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", *parallel, *arguments]


def phases(gpu: dict[str, str], env: dict[str, str], results: Path) -> list[Phase]:
    workers = min(8, os.cpu_count() or 1)
    bench_s = 220
    bench = [PYTHON, "-m", "vtok.bench.report", "--device", "cuda", "--results", str(results)]
    sanitized = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    sanitize = ["compute-sanitizer", "--target-processes", "all", "--error-exitcode", "99"]
    driver = [PYTHON, "tests/gpu/device.py"]
    triton = env | {"VTOK_BACKEND": "triton"}
    gone = "Device not supported"
    return [
        Phase("build", [PYTHON, str(Path(__file__).resolve()), "--build", gpu["architecture"]], 180, env),
        Phase("tests, CUDA C++", pytest(workers, "tests/gpu"), 120, env),
        Phase("tests, Triton", pytest(workers, "tests/gpu"), 150, triton),
        Phase("benchmark", [*bench, "--seconds", str(bench_s * 0.85)], bench_s, env),
        Phase("memcheck", [*sanitize, "--tool", "memcheck", *driver], 60, env | sanitized, gone),
        Phase("memcheck, wild", [*sanitize, "--tool", "memcheck", *driver, "--wild"], 60, env | sanitized, gone),
        Phase("racecheck", [*sanitize, "--tool", "racecheck", *driver], 60, env | sanitized, gone),
        Phase("synccheck", [*sanitize, "--tool", "synccheck", *driver], 60, env | sanitized, gone),
    ]


def build(architecture: str) -> None:
    """The library for one architecture, into the tree as an editable install would have it."""
    for folder, source in {"triton_kernels": "triton_kernels", "bench": "bench"}.items():
        link = ROOT / "vtok" / folder
        if not link.exists():
            link.symlink_to(ROOT / source)
    torch = Path(importlib.util.find_spec("torch").origin).parent
    into = LOGS / "cmake"
    configure = ["cmake", "-S", str(ROOT), "-B", str(into), "-DVTOK_CUDA=on", f"-DVTOK_CUDA_ARCHS={architecture}-real"]
    configure += [f"-DVTOK_TORCH={torch}", f"-DPython3_EXECUTABLE={PYTHON}"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(into), "--parallel", str(os.cpu_count() or 1)], check=True)
    draft = ROOT / "vtok" / "_C.so.new"
    shutil.copyfile(into / "_C.so", draft)
    draft.replace(ROOT / "vtok" / "_C.so")


def run(phase: Phase, deadline: float) -> Outcome:
    """Run a phase within its limit and what is left of the whole; its output goes to a log."""
    limit = min(phase.limit_s, deadline - time.monotonic())
    if limit < 5:
        return Outcome(phase.name, "out of time", 0, "not started")
    if not shutil.which(phase.command[0], path=phase.env["PATH"]):
        return Outcome(phase.name, "skipped", 0, f"{phase.command[0]} is not installed")
    print(f"--- {phase.name}", flush=True)
    log = LOGS / f"{re.sub('[^a-z]+', '-', phase.name.lower())}.log"
    start = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            phase.command, cwd=ROOT, env=phase.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    text = log.read_text(errors="replace")
    seconds = time.monotonic() - start
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    if phase.gone and phase.gone in text:
        return Outcome(phase.name, "skipped", seconds, phase.gone)
    if code == 0:
        return Outcome(phase.name, "ok", seconds, last[:100])
    print("\n".join(text.splitlines()[-40:]), flush=True)
    return Outcome(phase.name, "out of time" if code is None else "failed", seconds, last[:100])


def summary(gpu: dict[str, str], outcomes: list[Outcome], seconds: float) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = f"torch {gpu['torch']} · Triton {gpu['triton']} · CUDA {gpu['cuda']} · sm_{gpu['architecture']}"
    date = datetime.now(timezone.utc).isoformat("T", "seconds")
    rows = [f"| {o.name} | {o.result} | {o.seconds:.0f} | {o.detail.replace('|', '/')} |" for o in outcomes]
    head = [
        f"{gpu['device']} · {versions} · {date} · commit {commit.stdout.strip() or 'unknown'} · {seconds:.0f} s",
        "",
    ]
    return "\n".join([*head, "| phase | result | s | |", "|---|---|---:|---|", *rows, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where the numbers go")
    parser.add_argument("--only", help="phases whose name begins so; the others are not run")
    parser.add_argument("--build", metavar="ARCHITECTURE", help="build for 90, say, and do nothing else")
    options = parser.parse_args()
    if options.build:
        build(options.build)
        return 0
    start = time.monotonic()
    env = environment()
    gpu = describe(env)
    LOGS.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    chosen = [p for p in phases(gpu, env, options.results.resolve()) if p.name.startswith(options.only or "")]
    outcomes = [run(phase, start + TOTAL_S) for phase in chosen]
    if not options.only or "benchmark".startswith(options.only):
        for page in sorted(options.results.glob("*.md")):
            print(page.read_text() if page.stat().st_mtime > time.time() - (time.monotonic() - start) else "", end="")
    text = summary(gpu, outcomes, time.monotonic() - start)
    print(f"\n{text}")
    if not options.only:
        name = re.sub(r"[^a-z0-9]+", "-", gpu["device"].lower()).strip("-")
        (options.results / f"{name}-checks.md").write_text(text, encoding="utf-8")
    return int(any(outcome.result in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
