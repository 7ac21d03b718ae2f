"""Timers and probes. Timings are interleaved, in pairs: every round takes one sample of each variant in a fresh order,
and what is reported of two variants is the median over rounds of their ratio, so drift of the machine cancels."""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

PAIRS = 15
BACKLOG_CYCLES = 4_000_000  # some 2 ms of sleep ahead of a sample: the host is done enqueueing before it ends
GRAPH_S = 300e-6  # a captured sample lasts at least this long
HOST_S = 1e-3  # and a sample on the host clock this long
MOST_SETS = 1024


@dataclass(frozen=True)
class Variant:
    """Something to time: call(*args). before() runs ahead of each sample, outside the clock."""

    name: str
    call: Callable[..., Any]
    before: Callable[[], Any] = lambda: None


Times = dict[str, list[float]]  # seconds a call, one entry a round


def interleave(samplers: dict[str, Callable[[], float]], rounds: int) -> Times:
    times: Times = {name: [] for name in samplers}
    for r in range(rounds):
        for name in random.Random(r).sample(list(samplers), len(samplers)):
            times[name].append(samplers[name]())
    return times


def ratio(times: Times, of: str, to: str) -> float:
    """How many times longer ``of`` takes than ``to``: the median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def tensor_bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, torch.Tensor))


# --- on the host clock -------------------------------------------------------------------------------------------


def fresh_pages() -> None:
    """From now on large blocks come from the kernel and go back to it, so every output pays its page faults, as in a
    first forward pass; glibc would otherwise keep blocks of up to 32 MB after the first calls."""
    with contextlib.suppress(AttributeError, OSError):  # no glibc
        mmap_threshold = -3
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


def host_sampler(variant: Variant, arguments: list[tuple], sync: Callable[[], Any] = lambda: None) -> Callable:
    """Seconds a call on the host clock. Outputs are fresh each time, so their page faults are inside; the last one is
    freed after the clock stops."""
    call, args, number = variant.call, arguments[0], 1
    variant.before()
    for _ in range(2):  # the first call loads, compiles and warms up; the second says how many fill a sample
        start = time.perf_counter()
        kept = call(*args)
        sync()
        number = math.ceil(HOST_S / (time.perf_counter() - start))
        del kept

    def sample() -> float:
        variant.before()
        sync()
        start = time.perf_counter()
        for i in range(number):
            kept = call(*arguments[i % len(arguments)])
        sync()
        seconds = (time.perf_counter() - start) / number
        del kept
        return seconds

    return sample


# --- on the device clock -----------------------------------------------------------------------------------------


def rotation(working_set: int, cache: int) -> int:
    """How many copies of the arguments make the working set exceed three times the cache."""
    return min(MOST_SETS, max(1, math.ceil(3 * cache / max(working_set, 1)) + 1)) if working_set < 3 * cache else 1


def rotated(args: tuple, copies: int) -> list[tuple]:
    cloned = lambda: tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)  # noqa: E731
    return [args] + [cloned() for _ in range(copies - 1)]


def graph_sampler(variant: Variant, arguments: list[tuple]) -> Callable[[], float]:
    """Seconds a call on the device clock: replays of one CUDA graph that goes through all sets of arguments and keeps
    as many outputs alive, so neither inputs nor outputs are found in the cache. A sleep ahead of each replay is the
    backlog that keeps the device from waiting for the host."""
    call = variant.call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(*arguments[0])
        side.synchronize()
        start = time.perf_counter()
        for args in arguments[:8]:
            call(*args)
        side.synchronize()
        estimate = (time.perf_counter() - start) / len(arguments[:8])
    torch.cuda.current_stream().wait_stream(side)

    repeats = max(1, math.ceil(GRAPH_S / (estimate * len(arguments))))
    graph = torch.cuda.CUDAGraph()
    kept: deque[Any] = deque(maxlen=len(arguments))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for args in arguments:
                kept.append(call(*args))
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        torch.cuda._sleep(BACKLOG_CYCLES)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / (repeats * len(arguments))

    for _ in range(2):  # the first replay uploads the graph
        sample()
    return sample


def sampler(variant: Variant, arguments: list[tuple], device: torch.device) -> tuple[Callable[[], float], str]:
    """The fitting sampler and what its clock is: "host", "graph", or "synced" where the variant syncs by itself and so
    can't be captured (its waits are then part of its time, as they are for its users)."""
    if device.type == "cpu":
        return host_sampler(variant, arguments), "host"
    if syncs(variant.call, arguments[0]):
        return host_sampler(variant, arguments, torch.cuda.synchronize), "synced"
    return graph_sampler(variant, arguments), "graph"


# --- probes ------------------------------------------------------------------------------------------------------


def syncs(call: Callable, args: tuple) -> bool:
    """Whether a call makes the host wait for the device, by torch's own watch; capture tells the rest."""
    call(*args)  # whatever happens once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*args)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def launches(call: Callable, args: tuple) -> int | None:
    """Kernels, copies and fills that a call enqueues; None where the profiler sees no device."""
    found = 0
    for _ in range(2):  # the first profile of a process may miss some
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            call(*args)
            torch.cuda.synchronize()
        found = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in prof.events())
    return found or None


def host_latency(call: Callable, args: tuple, number: int = 50) -> float:
    """Seconds a call when called one after another, launches included: what a launch-bound forward pass pays."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        call(*args)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / number


def extra_bytes(call: Callable, args: tuple, device: torch.device) -> int:
    """Peak memory of a call beyond its inputs and outputs."""
    call(*args)
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = call(*args)
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated(device) - before - tensor_bytes(out))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        out = call(*args)
    events = prof.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(0, peak(change for _, change in changes) - tensor_bytes(out))


def peak(changes: Iterable[int]) -> int:
    now = highest = 0
    for change in changes:
        now += change
        highest = max(highest, now)
    return highest


def dispatch(call: Callable, args: tuple, kwargs: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Seconds of this thread's time a call, on arguments so small that the kernel's own hardly counts: under
    inference_mode, in grad mode with nothing to differentiate, and with gradients asked for. The least of the rounds:
    a fixed overhead that other processes can only add to."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    tracked = tuple(
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in args
    )

    def sample(guard: Callable, args: tuple, number: int = 200) -> float:
        with guard():
            sync()
            start = time.thread_time()
            for _ in range(number):
                call(*args, **kwargs)
            seconds = (time.thread_time() - start) / number
            sync()
            return seconds

    modes = {
        "inference_mode": lambda: sample(torch.inference_mode, args),
        "grad mode": lambda: sample(torch.enable_grad, args),
        "requires_grad": lambda: sample(torch.enable_grad, tracked),
    }
    return {name: min(seconds) for name, seconds in interleave(modes, PAIRS).items()}
