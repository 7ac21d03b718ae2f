"""The benchmark's own code: timers, verification, reports, regressions; and every bench file, at tiny sizes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from contextlib import suppress
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from vtok import methods, video
from vtok.bench import counts, measure, quality, regress, report, suite
from vtok.bench.measure import Variant
from vtok.bench.readme import performance_table
from vtok.bench.suite import Mismatch, Subject, verify
from vtok.bench.workload import CLIPS, Workload, modules, tiny
from vtok.ops._rooms import ROOMS

from rooms import ROOT

CPU = torch.device("cpu")
with tiny():
    TINY = [(op, w) for op, module in modules().items() for w in module.workloads()]


# --- every bench file ---------------------------------------------------------------------------------------------


def test_every_op_has_workloads():
    assert set(ROOMS) <= set(modules())


@pytest.mark.parametrize("op, workload", TINY, ids=[f"{op}-{w.name.replace(' ', '-')}" for op, w in TINY])
def test_workload(op, workload):
    """vtok equals the reference, eager returns as much, inputs aren't zeros, and no bytes are counted that aren't."""
    subject, args = Subject(op, modules()[op]), workload.make(CPU)
    got = subject.run(*args, **workload.kwargs)
    verify(got, subject.reference(*args, **workload.kwargs), workload.exact)
    suite.same_count(subject.eager(*args, **workload.kwargs), got)
    assert args[0].any()
    assert workload.roof in ("read", "copy", None)
    assert 0 < workload.bytes <= measure.tensor_bytes((args, got))


def test_real_sizes_come_back_after_tiny():
    assert CLIPS["32×14×14×3584"] == (32, 196, 3584)


def test_pytest_runs_the_workloads():
    command = [sys.executable, "-m", "pytest", "bench", "--tiny", "--benchmark-disable", "-v", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(f"test_vtok[{op}-" in done.stdout and f"test_eager[{op}-" in done.stdout for op in ROOMS)


# --- timing -------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_paired():
    clock = itertools.count()
    times = measure.interleave({name: lambda: next(clock) for name in "abc"}, rounds=20)
    for r in range(20):
        assert sorted(times[name][r] for name in "abc") == [3 * r, 3 * r + 1, 3 * r + 2]
    assert len({tuple(sorted("abc", key=lambda name: times[name][r])) for r in range(20)}) > 2  # nobody is always first


def test_ratio_is_the_median_of_pairs():
    """Drift that hits both alike leaves the ratio alone, where the ratio of medians would not be 2."""
    assert measure.ratio({"slow": [2, 20, 200, 4], "fast": [1, 10, 100, 2]}, "slow", "fast") == 2


def test_host_sampler_times_a_call(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(x):
        calls.append(x)
        now[0] += 3e-4

    sample = measure.host_sampler(Variant("v", call), [(1,), (2,)])
    calls.clear()
    assert sample() == pytest.approx(3e-4)
    assert calls == [1, 2, 1, 2]  # enough for a millisecond, through all the arguments


@pytest.mark.parametrize(
    "working_set, copies", [(1 << 30, 1), (150_000, 1), (149_999, 3), (50_000, 4), (1, measure.MOST_SETS)]
)
def test_rotation_exceeds_the_cache(working_set, copies):
    assert measure.rotation(working_set, cache=50_000) == copies


def test_rotated_arguments_share_no_memory():
    args = (torch.randn(4), 3, torch.randn(2))
    sets = measure.rotated(args, 3)
    assert len({s[0].data_ptr() for s in sets}) == 3 and all(torch.equal(s[2], args[2]) and s[1] == 3 for s in sets)


def test_peak_memory_of_a_call():
    def call(x):
        scratch = x.repeat(3)
        return scratch[:10].clone()

    assert measure.extra_bytes(call, (torch.randn(1000),), CPU) == 12_000
    assert measure.peak([5, -5, 3, 4, -1]) == 7


def test_a_slow_compiler_is_stopped():
    with pytest.raises(TimeoutError, match="took over"), suite.time_limit(0.01, "compiling took over 0 s"):
        while True:
            pass
    with pytest.raises(TimeoutError, match="took over"), suite.time_limit(0.01, "compiling took over 0 s"):
        with suppress(TimeoutError):  # as the compiler may
            time.sleep(9)
        time.sleep(9)


# --- what a result says -------------------------------------------------------------------------------------------


def fake_module(run=lambda x: x * 2, reference=lambda x: x + x, eager=lambda x: x * 2, **more):
    return SimpleNamespace(run=run, reference=reference, eager=eager, **more)


def small(**changes) -> Workload:
    return Workload(
        **{"name": "64", "make": lambda d: (torch.randn(64, 8, device=d),), "bytes": 4096, "roof": "copy"} | changes
    )


@pytest.fixture
def without_compiling(monkeypatch):
    def compiled(*_):
        raise TimeoutError("not here")

    monkeypatch.setattr(Subject, "compiled", compiled)


def test_wrong_outputs_are_refused(without_compiling):
    subject = Subject("wrong", fake_module(run=lambda x: x * 2 + (torch.arange(8) == 3)))
    results = suite.measure_workload(subject, small(), CPU, pairs=3)
    assert all("output 0 differs" in r["refused"] and "us" not in r for r in results)


def test_a_result_has_everything():
    for result in suite.measure_workload(Subject("double", fake_module()), small(), CPU, pairs=3):
        assert result["us"] > 0 and result["gbs"] == pytest.approx(4096 / result["us"] / 1e3)
        assert {"share", "vs_eager", "vs_compile", "extra_bytes", "rows", "missed"} <= set(result)
        assert result["extra_bytes"] <= 64 and result["rows"] == 64  # the 2 is a tensor too


def test_a_baseline_that_fails_is_noted(without_compiling):
    def eager(x):
        raise ValueError("no such thing")

    result = suite.measure_workload(Subject("double", fake_module(eager=eager)), small(), CPU, pairs=3)[0]
    assert result["notes"]["eager"] == "ValueError: no such thing" and "vs_eager" not in result


@pytest.mark.parametrize(
    "got, want, exact",
    [
        (torch.tensor([1]), torch.tensor([2]), False),
        (torch.tensor([1.0]), torch.tensor([1.0 + 1e-7]), True),
        (torch.tensor([1.0]), torch.tensor([1.1]), False),
        (torch.tensor([1.0]), torch.tensor([1.0]).double(), False),
        (torch.tensor([[1.0]]), torch.tensor([1.0]), False),
        ((torch.tensor([1]), torch.tensor([1])), torch.tensor([1]), True),
    ],
)
def test_verify_refuses(got, want, exact):
    with pytest.raises(Mismatch):
        verify(got, want, exact)


def test_verify_accepts():
    nan = torch.tensor([1.0, float("nan")])
    verify(nan, nan.clone(), exact=True)
    verify(torch.tensor([1.0]), torch.tensor([1.0 + 1e-7]), exact=False)


def test_bars():
    def missed(device, backend="cpp avx512", gpu_only=False, **values):
        made = {
            "device": device,
            "backend": backend,
            "us": 30.0,
            "clock": "graph",
            "extra_bytes": 0,
            "rows": 10,
        } | values
        workload = small(roof=made.pop("roof"), gpu_only=gpu_only, limit_us=made.pop("limit_us", None))
        return suite.missed(made, Subject("double", fake_module()), workload)

    assert missed("cpu", roof="read", share=0.81, vs_eager=11, vs_compile=1.6) == []
    assert missed("cpu", roof="read", share=0.7, vs_eager=11, vs_compile=1.6) == ["share 0.70 < 0.8"]
    assert missed("cpu", "cpp avx2", roof="read", share=0.7) == []
    assert missed("cpu", roof="copy", share=0.85) == ["share 0.85 < 0.9"]
    assert missed("cuda", "cuda", roof="copy", share=0.5) == []  # a clip alone does not fill the device
    assert missed("cuda", "cuda", gpu_only=True, roof="copy", share=0.5) == ["share 0.50 < 0.85"]
    assert missed("cuda", "cuda", roof=None, limit_us=25) == ["30.0 µs over the bound > 25 µs"]
    assert missed("cuda", "cuda", roof="read", limit_us=25, share=0.2) == []  # 24 µs over a bound of 6
    assert missed("cuda", "cuda", roof=None, clock="synced") == ["syncs with the host"]
    assert missed("cuda", "cuda", roof=None, launches=4) == ["4 launches > 3"]
    assert missed("cpu", roof=None, rows=1000, extra_bytes=40_000) == ["40.0 extra bytes a row > 16"]


# --- reports ------------------------------------------------------------------------------------------------------


def made_report(**changes) -> dict:
    result = {
        "op": "pack", "workload": "clip", "device": "cpu", "backend": "cpp avx2", "us": 100.0, "gbs": 4.0, "share": 0.9,
        "bytes": 400, "vs_eager": 2.0, "missed": [], "notes": {"compile": "TimeoutError: slow"},
    }  # fmt: skip
    machine = {"load": 3.0, "device": "cpu", "cpu": "Some CPU", "isa": "avx2", "threads": 2, "vtok": "1", "torch": "2"}
    whole = {"machine": machine, "date": "2026-01-01", "commit": None, "pairs": 15, "dispatch": [], "left_out": []}
    return whole | {"results": [result | changes]}


def test_regressions_go_by_the_share_of_the_roof():
    old = made_report()
    assert regress.regressions(old, made_report(us=300.0, share=0.8)) == []  # a slower machine, not a slower kernel
    assert "1.50× slower" in regress.regressions(old, made_report(share=0.6))[0]
    assert regress.regressions(old, made_report(backend="cuda")) == [
        "pack/clip/cpu/cpp avx2: expected a result, got none"
    ]


def test_regressions_without_a_roof_go_by_time():
    old, new = made_report(), made_report(us=130.0)
    for made in (old, new):
        del made["results"][0]["share"]
    assert "1.30× slower" in regress.regressions(old, new)[0]


def test_table_says_everything(capsys):
    wrong = made_report()["results"][0] | {"refused": "output 0 differs"}
    full = made_report(missed=["share 0.90 < 0.95"])
    full["results"].append(wrong)
    report.show(full)
    shown = capsys.readouterr().out
    for text in (
        "Some CPU, avx2, 2 threads, beside other work (load 3.0)",
        "100.0",
        "4.0",
        "90%",
        "2.00",
        "share 0.90 < 0.95",
        "output 0 differs",
    ):
        assert text in shown and text in report.to_markdown(full)
    assert "pack clip: no compile: TimeoutError: slow" in shown
    assert "100.0" in report.plain([report.row(r) for r in full["results"]])


def test_json_is_written_whole_and_never_replaced_by_accident(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "measure_all", lambda *_: made_report())
    file = tmp_path / "out.json"
    assert report.main(["--json", str(file), "--results", str(tmp_path / "results")]) == 0
    assert json.loads(file.read_text())["results"][0]["us"] == 100.0
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["cpu-some-cpu-avx2.json", "cpu-some-cpu-avx2.md"]
    assert report.main(["--json", str(file)]) == 2
    assert "--force" in capsys.readouterr().err
    assert report.main(["--json", str(file), "--force"]) == 0
    assert list(tmp_path.glob(".*")) == []


def test_compare_fails_on_a_regression(tmp_path, monkeypatch):
    old = tmp_path / "old.json"
    report.write(old, report.to_json(made_report()))
    for share, status in ((0.9, 0), (0.5, 1)):
        monkeypatch.setattr(report, "measure_all", lambda *_, share=share: made_report(share=share))
        assert report.main(["--compare", str(old)]) == status


def test_unknown_ops_are_named(capsys):
    assert report.main(["--ops", "nonsense"]) == 2
    assert "got nonsense" in capsys.readouterr().err


def test_an_op_that_fails_leaves_the_others(monkeypatch, without_compiling):
    def broken(device):
        raise RuntimeError("no")

    good = fake_module(workloads=lambda: [small()])
    bad = fake_module(workloads=lambda: [small(make=broken)])
    monkeypatch.setattr(report, "measure_dispatch", lambda *_: {})
    results = report.measure_all({"bad": bad, "good": good}, CPU, quick=True, seconds=None)["results"]
    assert results[0]["error"] == "RuntimeError: no" and all(r["us"] > 0 for r in results[1:])


def test_out_of_time_is_listed():
    module = fake_module(workloads=lambda: [small()])
    assert report.measure_all({"one": module}, CPU, quick=True, seconds=-1)["left_out"] == ["one 64"]


# --- the README ---------------------------------------------------------------------------------------------------


def test_performance_table_takes_the_largest_size_of_each_op(tmp_path):
    made = made_report()
    made["results"].append(made["results"][0] | {"workload": "larger clip", "bytes": 800})
    report.write(tmp_path / "a.json", report.to_json(made))
    table = performance_table(tmp_path)
    assert "larger clip" in table and "| clip " not in table


def test_readme_shows_the_committed_results():
    between = (ROOT / "README.md").read_text().split("performance:begin -->")[1].split("<!-- performance:end")[0]
    assert between.strip() == performance_table(ROOT / "bench" / "results"), "run python tools/readme.py"


# --- counts and quality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x, (x > 0).long()),
        lambda x: x.masked_fill_(x > 0, 0)[(x == 0).long()][torch.ones(4, dtype=torch.bool)],
    ],
)
def test_a_wait_is_counted(waiting):
    x = torch.randn(4)
    with counts.Count() as counted:
        waiting(x)
    assert counted.syncs == 1


def test_what_does_not_wait_is_not_counted():
    x = torch.randn(4, 5)
    with counts.Count() as counted:
        x[x.argmax(0)].cumsum(0).repeat_interleave(2)
    assert counted.syncs == 0 and counted.operators >= 4


@pytest.mark.parametrize("method", methods.names("score", "merge"))
def test_no_method_waits(method):
    assert counts.count(method, CPU).syncs == 0


def test_quality_of_a_clip():
    """Uniform loses nothing on a static clip; a method that refuses a budget says so and has no point."""
    frames = torch.randint(0, 256, (1, 32, 48, 3), dtype=torch.uint8).expand(8, -1, -1, -1).contiguous()
    found, refused = quality.losses(frames)
    assert set(found) == set(methods.names()) - set(quality.UNBUDGETED)
    assert found["uniform"][-1] == 0 and found["temporal_merge"][-1] < 1e-12
    assert {name for name, mse in found.items() if None in mse} == set(refused)


def test_quality_writes_both_files(tmp_path):
    clip, frames = tmp_path / "clip.mp4", torch.randint(0, 256, (6, 32, 48, 3), dtype=torch.uint8)
    video.write(clip, frames.numpy(), Fraction(4))
    assert quality.main([str(clip), "--out", str(tmp_path / "q")]) == 0
    (measured,) = json.loads((tmp_path / "q.json").read_text())["clips"]
    assert measured["frames"] == 6 and measured["mse"]["evs"][0] > measured["mse"]["evs"][-1]
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


def test_no_runs_lose_less_than_the_optimal_ones():
    """On the clips of the README's figure, at every number of rows."""
    for clip in json.loads((ROOT / "docs" / "quality.json").read_text())["clips"]:
        optimal = clip["mse"]["optimal"]
        assert sum(mse is not None for mse in optimal) >= 6
        for name in quality.FAMILIES[quality.RUNS]:
            pairs = zip(optimal, clip["mse"][name], strict=True)
            assert all(least is None or least <= mse for least, mse in pairs), f"{name} on {clip['clip']}"
