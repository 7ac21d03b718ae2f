"""`pytest bench/`: every workload of every bench_<op>.py under pytest-benchmark.

--tiny shrinks the clips, so that with --benchmark-disable the benchmark's own code is tested anywhere in seconds."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from vtok.bench.suite import Subject
from vtok.bench.workload import modules, tiny


def pytest_addoption(parser):
    parser.addoption("--tiny", action="store_true", help="every clip shrunk to a few rows")
    parser.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    return torch.device(pytestconfig.getoption("--bench-device"))


def pytest_generate_tests(metafunc):
    if "workload" in metafunc.fixturenames:
        where = torch.device(metafunc.config.getoption("--bench-device"))
        with tiny() if metafunc.config.getoption("--tiny") else nullcontext():
            subjects = [Subject(op, module) for op, module in modules().items()]
            pairs = [(subject, workload) for subject in subjects for workload in subject.workloads(where, quick=False)]
        ids = [f"{subject.op}-{workload.name.replace(' ', '-')}" for subject, workload in pairs]
        metafunc.parametrize("subject, workload", pairs, ids=ids)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """GB/s beside the seconds, from the bytes that each workload declares."""
    for benchmark in output_json["benchmarks"]:
        benchmark["extra_info"]["gbs"] = benchmark["extra_info"]["bytes"] / benchmark["stats"]["median"] / 1e9
