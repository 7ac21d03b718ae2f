"""What is compared on one workload: vtok's backends, eager PyTorch, torch.compile of the reference, and the roof."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.utils._pytree import tree_map

import vtok
from vtok import _load
from vtok.bench import measure
from vtok.bench.measure import Variant
from vtok.bench.workload import Workload, tiny
from vtok.ops._rooms import ROOMS

BEST_ISA = _load.cpu_isa()
COMPILE_S = 120.0  # one op's torch.compile, all its sizes together
ROOF_BYTES = 1 << 30  # the buffer whose copy is the roof of a GPU
BYTES_A_TOKEN = 16  # peak extra memory

# The bars of DESIGN.md section 5, by device and roof; a bench file with others says BARS = {"cpu": ..., "cuda": ...}.
# All are least values but launches, the most. On a GPU shares and ratios hold for the million-row sizes, a clip alone
# being too short to fill it.
BARS: dict[tuple[str, str | None], dict[str, float]] = {
    ("cpu", "read"): {"share": 0.8, "vs_compile": 1.5, "vs_eager": 10},
    ("cpu", "copy"): {"share": 0.9},
    ("cuda", "read"): {"share": 0.85, "vs_compile": 1.2, "vs_eager": 3},
    ("cuda", "copy"): {"share": 0.85, "vs_compile": 1.2, "vs_eager": 3},
    ("cuda", None): {"launches": 3},
}
READ_BAR_AVX2 = 0.65


class Mismatch(Exception):
    """Outputs that differ; nothing is timed then."""


class Subject:
    """One bench file: what vtok runs, what that must equal, and the baselines."""

    def __init__(self, op: str, module: ModuleType, compile_s: float = COMPILE_S):
        self.op, self.module, self.eager = op, module, module.eager
        self.is_op = not hasattr(module, "run")
        self.run: Callable = getattr(vtok.ops, op) if self.is_op else module.run
        self.reference: Callable = ROOMS[op].reference if self.is_op else module.reference
        self._compiled: Callable | None = None
        self.compile_s = self._compile_left = compile_s

    def workloads(self, device: torch.device, quick: bool) -> list[Workload]:
        """Those for the device; on a GPU the largest first, for the bars are theirs and the time may run out."""
        made = [w for w in self.module.workloads() if device.type == "cuda" or not w.gpu_only]
        return made[:1] if quick else sorted(made, key=lambda w: not w.gpu_only)

    def backends(self, device: torch.device, kwargs: dict[str, Any]) -> list[Variant]:
        """On the CPU one per instruction set that has a bar; on a GPU CUDA C++ and Triton."""

        def call(*args):
            return self.run(*args, **kwargs)

        if device.type == "cpu":
            isas = {"none": [], "avx512": ["avx512", "avx2"]}.get(BEST_ISA, [BEST_ISA])
            return [Variant(f"cpp {isa}", call, _switch_to(isa)) for isa in isas] or [Variant("reference", call)]
        served = vtok.backend_of(self.op if self.is_op else "pack", device)
        variants = [Variant(served, call)]
        if served == "cuda" and self.is_op and importlib.util.find_spec("triton"):
            launcher = getattr(importlib.import_module(f"vtok.triton_kernels.{self.op}"), self.op)
            variants.append(Variant("triton", lambda *args: launcher(*args, **kwargs)))
        return variants

    def compiled(self, args: tuple, kwargs: dict[str, Any]) -> Variant:
        """torch.compile of the reference; one per op, so that its sizes share what the compiler makes dynamic."""
        if self._compiled is None:
            torch._dynamo.reset()
            torch._logging.set_logs(
                dynamo=logging.ERROR
            )  # the references' checks look at values: that breaks the graph
            torch._inductor.config.compile_threads = 1  # in this process, where the limit can stop it
            self._compiled = torch.compile(self.reference)
        compiled, start = self._compiled, time.perf_counter()
        with time_limit(self._compile_left, f"compiling took over {self.compile_s:.0f} s"):
            compiled(*args, **kwargs)
        self._compile_left -= time.perf_counter() - start
        return Variant("compile", lambda *args: compiled(*args, **kwargs))


def _switch_to(isa: str) -> Callable[[], Any]:
    return lambda: _load.cpu_isa(isa)


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raises TimeoutError in the main thread; elsewhere, and where there are no such signals, the limit is not kept."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1)  # and each second after: the compiler swallows errors
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- verification ------------------------------------------------------------------------------------------------


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def verify(got: Any, want: Any, exact: bool) -> None:
    """Raise Mismatch unless the outputs agree: decisions always, floats bit for bit or to their dtype's tolerance."""
    got, want = outputs(got), outputs(want)
    same_form(got, want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        b = b.to(a.device)
        try:
            tolerance = 0.0 if exact or not a.is_floating_point() else None  # None is the dtype's own
            torch.testing.assert_close(a, b, equal_nan=True, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            raise Mismatch(f"output {i} differs: {' '.join(str(error).split())}") from None


def same_form(got: Any, want: Any) -> None:
    form = [[(t.dtype, tuple(t.shape)) for t in outputs(result)] for result in (got, want)]
    if form[0] != form[1]:
        raise Mismatch(f"outputs are {form[0]}, expected {form[1]}")


def same_count(got: Any, want: Any) -> None:
    """All that holds of eager code, which may let the data decide a shape, or compute in the tokens' dtype."""
    if len(outputs(got)) != len(outputs(want)):
        raise Mismatch(f"{len(outputs(got))} outputs, expected {len(outputs(want))}")


def expected(subject: Subject, workload: Workload, args: tuple) -> tuple[Tensor, ...]:
    """The reference's outputs; for a GPU those of the CPU kernels, which equal the reference's and hold any size."""
    if args[0].device.type == "cpu":
        return outputs(subject.reference(*args, **workload.kwargs))
    copies = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, args)
    return outputs(subject.run(*copies, **workload.kwargs))


# --- the roof ----------------------------------------------------------------------------------------------------


def roof(workload: Workload, args: tuple) -> Variant | None:
    """Reads or copies the same bytes; on a GPU a large copy, whose bandwidth is the roof of everything."""
    if workload.roof is None:
        return None
    if args[0].device.type == "cuda":
        source = torch.randn(ROOF_BYTES // 4, device=args[0].device)
        target = torch.empty_like(source)
        return Variant("roof", lambda *_: target.copy_(source))
    if workload.roof == "read":
        return Variant("roof", lambda *args: args[0].sum())
    source = torch.randn(max(1, workload.bytes // 8))  # half is read, half is written
    return Variant("roof", lambda *_: source.clone())


def share_of_roof(workload: Workload, device: torch.device, times: measure.Times, name: str) -> float:
    share = measure.ratio(times, "roof", name)
    return share * workload.bytes / (2 * ROOF_BYTES) if device.type == "cuda" else share


# --- one workload ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_workload(subject: Subject, workload: Workload, device: torch.device, pairs: int) -> list[dict[str, Any]]:
    """One result for each backend; a backend whose outputs are wrong gets ``refused`` and no time."""
    torch.manual_seed(0)
    args = workload.make(device)
    want = expected(subject, workload, args)
    results, timed = [], []
    for backend in subject.backends(device, workload.kwargs):
        backend.before()
        result: dict[str, Any] = {
            "op": subject.op,
            "workload": workload.name,
            "device": device.type,
            "backend": backend.name,
        }
        try:
            verify(backend.call(*args), want, workload.exact)
            timed.append(backend)
        except Mismatch as mismatch:
            result["refused"] = str(mismatch)
        results.append(result)
    baselines, notes = _baselines(subject, workload, args, want)
    del want
    variants = [*timed, *baselines, *filter(None, [roof(workload, args)])]
    times, clocks, problems = _time(variants, args, workload, device, pairs)
    for result in results:
        name = result["backend"]
        if name in problems:
            result["error"] = problems.pop(name)
        result["notes"] = notes | problems
        if name in times:
            _describe(result, workload, device, times, clocks[name])
            _probe(result, next(b for b in timed if b.name == name), args, device)
            result["missed"] = missed(result, subject, workload)
    return results


def _baselines(subject: Subject, workload: Workload, args: tuple, want: Any) -> tuple[list[Variant], dict[str, str]]:
    """eager and compile as far as they run and return what the op returns; the reasons where they don't."""
    makers = {
        "eager": (lambda: Variant("eager", lambda *args: subject.eager(*args, **workload.kwargs)), same_count),
        "compile": (lambda: subject.compiled(args, workload.kwargs), same_form),
    }
    found, notes = [], {}
    for name, (make, check) in makers.items():
        try:
            variant = make()
            check(variant.call(*args), want)
            found.append(variant)
        except Exception as error:  # a baseline that fails is a fact to report, whatever it is
            notes[name] = _one_line(error)
    return found, notes


def _time(variants: list[Variant], args: tuple, workload: Workload, device: torch.device, pairs: int):
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    arguments = measure.rotated(args, measure.rotation(workload.bytes, cache))
    samplers, clocks, problems = {}, {}, {}
    for variant in variants:
        sets = arguments[:1] if variant.name == "roof" else arguments  # it has its own, larger than any cache
        try:
            samplers[variant.name], clocks[variant.name] = measure.sampler(variant, sets, device)
        except torch.OutOfMemoryError as error:
            problems[variant.name] = _one_line(error)
    return measure.interleave(samplers, pairs), clocks, problems


def _describe(result: dict, workload: Workload, device: torch.device, times: measure.Times, clock: str) -> None:
    name = result["backend"]
    seconds = statistics.median(times[name])
    quartiles = statistics.quantiles(times[name], n=4) if len(times[name]) > 1 else [seconds] * 3
    result |= {"us": seconds * 1e6, "us_quartiles": [quartiles[0] * 1e6, quartiles[2] * 1e6], "clock": clock}
    result |= {"bytes": workload.bytes, "gbs": workload.bytes / seconds / 1e9, "pairs": len(times[name])}
    result["roof"] = workload.roof
    if "roof" in times:
        result["share"] = share_of_roof(workload, device, times, name)
    for baseline in ("eager", "compile"):
        if baseline in times:
            result[f"vs_{baseline}"] = measure.ratio(times, baseline, name)


def _probe(result: dict, backend: Variant, args: tuple, device: torch.device) -> None:
    backend.before()
    result |= {"rows": args[0].shape[0], "extra_bytes": measure.extra_bytes(backend.call, args, device)}
    if device.type == "cuda":
        result["launches"] = measure.launches(backend.call, args)
        result["host_us"] = measure.host_latency(backend.call, args) * 1e6


def missed(result: dict, subject: Subject, workload: Workload) -> list[str]:
    """The bars that this result does not reach, in words; none where it reaches all that were measured."""
    device = result["device"]
    bars = dict(getattr(subject.module, "BARS", {}).get(device) or BARS.get((device, workload.roof), {}))
    most = bars.pop("launches", None)
    if device == "cuda" and not workload.gpu_only:
        bars = {}
    if result["backend"] == "cpp avx2" and workload.roof == "read" and "share" in bars:
        bars["share"] = READ_BAR_AVX2
    found = [f"{name} {result[name]:.2f} < {bar:.3g}" for name, bar in bars.items() if result.get(name, bar) < bar]
    if most is not None and (result.get("launches") or 0) > most:
        found.append(f"{result['launches']} launches > {most}")
    if device == "cuda" and workload.limit_us is not None:
        over = result["us"] * (1 - result.get("share", 0))
        if over > workload.limit_us:
            found.append(f"{over:.1f} µs over the bound > {workload.limit_us:g} µs")
    if result["clock"] == "synced":
        found.append("syncs with the host")
    if result["extra_bytes"] > BYTES_A_TOKEN * result["rows"] + 4096:  # allocators round up
        found.append(f"{result['extra_bytes'] / result['rows']:.1f} extra bytes a row > {BYTES_A_TOKEN}")
    return found


def _one_line(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:200]


def measure_dispatch(subject: Subject, device: torch.device) -> dict[str, Any]:
    """Microseconds a call that has next to nothing to do, by autograd mode."""
    with tiny():
        workload = subject.module.workloads()[0]
        args = workload.make(device)
    subject.backends(device, {})[0].before()
    subject.run(*args, **workload.kwargs)
    seconds = measure.dispatch(subject.run, args, workload.kwargs, device)
    return {"op": subject.op, "device": device.type} | {mode: value * 1e6 for mode, value in seconds.items()}
