"""Every workload of every bench_<op>.py, as vtok runs it and as users write it in eager PyTorch. Outputs are checked
before anything is timed. `vtok bench` is the careful measurement: paired, interleaved, against the roof."""

from __future__ import annotations

import pytest
import torch

from vtok.bench.suite import expected, same_count, verify


@pytest.fixture
def args(workload, device) -> tuple:
    torch.manual_seed(0)
    return workload.make(device)


def timed(benchmark, call, workload, args):
    def once():
        call(*args, **workload.kwargs)
        if args[0].device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["bytes"] = workload.bytes
    with torch.inference_mode():
        benchmark(once)


def test_vtok(benchmark, subject, workload, args):
    want = expected(subject, workload, args)
    for backend in reversed(subject.backends(args[0].device, workload.kwargs)):  # the default one last: it is timed
        backend.before()
        verify(backend.call(*args), want, workload.exact)
    timed(benchmark, subject.run, workload, args)


def test_eager(benchmark, subject, workload, args):
    same_count(subject.eager(*args, **workload.kwargs), expected(subject, workload, args))
    timed(benchmark, subject.eager, workload, args)
