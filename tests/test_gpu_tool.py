"""tools/gpu.py without a GPU: phases end within their time, fail visibly, and never stop the ones after."""

from __future__ import annotations

import importlib.util
import os
import sys
import time

import pytest

from rooms import ROOT

spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
sys.modules["gpu_tool"] = gpu
spec.loader.exec_module(gpu)

H100 = {"device": "NVIDIA H100", "architecture": "90", "torch": "2.11", "triton": "3.6", "cuda": "13.0"}


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path)


def python(code: str, **more):
    return gpu.Phase("a phase", [sys.executable, "-c", code], more.pop("limit_s", 60), dict(os.environ), **more)


def run(phase, left: float = 100):
    return gpu.run(phase, time.monotonic() + left)


def test_outcomes():
    assert run(python("print('first'); print('3 passed')")).result == "ok"
    assert run(python("print('first'); print('3 passed')")).detail == "3 passed"
    assert run(python("raise SystemExit(3)")).result == "failed"
    assert (
        run(python("print('Device not supported'); raise SystemExit(1)", gone="Device not supported")).result
        == "skipped"
    )
    assert run(gpu.Phase("a", ["no-such-tool"], 60, dict(os.environ))).result == "skipped"
    assert run(python("pass"), left=1).result == "out of time"


def test_a_phase_that_hangs_is_ended(tmp_path):
    start = time.monotonic()
    outcome = run(python("print('so far', flush=True); import time; time.sleep(60)", limit_s=6))
    assert outcome.result == "out of time" and outcome.detail == "so far"
    assert time.monotonic() - start < 30


def test_every_phase_runs_and_the_status_says_whether_one_failed(tmp_path, monkeypatch, capsys):
    phases = [python("print('one'); raise SystemExit(1)"), python("print('two')")]
    monkeypatch.setattr(gpu, "describe", lambda env: H100)
    monkeypatch.setattr(gpu, "phases", lambda *_: phases)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path / "results")])
    assert gpu.main() == 1
    text = (tmp_path / "results" / "nvidia-h100-checks.md").read_text()
    assert text in capsys.readouterr().out
    assert "NVIDIA H100 · torch 2.11 · Triton 3.6" in text and "| failed |" in text and "| ok |" in text
    phases.pop(0)
    assert gpu.main() == 0


def test_phases_name_files_that_exist(tmp_path):
    phases = gpu.phases(H100, dict(os.environ), tmp_path)
    for phase in phases:
        assert all((ROOT / part).exists() for part in phase.command if part.startswith("tests/"))
    assert {"build", "benchmark"} < {phase.name for phase in phases}
    assert gpu.TOTAL_S < 600
