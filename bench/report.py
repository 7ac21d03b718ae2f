"""`vtok bench`: measures the ops here and now, prints the table, and keeps the numbers as JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import vtok
from vtok import _load
from vtok.bench import counts, measure, regress
from vtok.bench.suite import BEST_ISA, COMPILE_S, Subject, measure_dispatch, measure_workload
from vtok.bench.workload import modules

BUSY_LOAD = 0.5  # at the start: then other processes ran beside the measurement
COLUMNS = ("op", "workload", "backend", "µs", "GB/s", "of roof", "× eager", "× compile", "bars")


def main(argv: list[str] | None = None) -> int:
    """The command; returns 2 where outputs were wrong or an argument is, 1 for a regression, else 0."""
    options = parse(argv)
    if options.json and options.json.exists() and not options.force:
        print(f"expected a file that does not exist, got {options.json}; --force replaces it", file=sys.stderr)
        return 2
    known = modules()
    if unknown := sorted(set(options.ops) - set(known)):
        print(f"expected ops among {', '.join(known)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    older = json.loads(options.compare.read_text()) if options.compare else None
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = {op: known[op] for op in known if op in (options.ops or known)}
    report = measure_all(chosen, device, options.quick, options.seconds)
    show(report)
    if options.json:
        write(options.json, to_json(report))
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        name = slug(report["machine"])
        write(options.results / f"{name}.json", to_json(report))
        write(options.results / f"{name}.md", to_markdown(report))
    wrong = any("refused" in r or "error" in r for r in report["results"])
    behind = regress.report(older, report) if older else 0
    return 2 if wrong else behind


def measure_all(chosen: dict[str, Any], device: torch.device, quick: bool, seconds: float | None) -> dict[str, Any]:
    """The whole report as plain data. Of the time each op may have its part of what is left."""
    measure.fresh_pages()
    report: dict[str, Any] = {"machine": machine(device), "date": datetime.now(timezone.utc).isoformat("T", "seconds")}
    report |= {"commit": commit(), "pairs": 5 if quick else measure.PAIRS}
    report |= {"results": [], "dispatch": [], "left_out": []}
    end = time.monotonic() + (float("inf") if seconds is None else seconds)
    for done, (op, module) in enumerate(chosen.items()):
        part = (end - time.monotonic()) / (len(chosen) - done)
        measure_op(Subject(op, module, min(COMPILE_S, part / 2)), device, quick, time.monotonic() + part, report)
    if _load.loaded:
        _load.cpu_isa(BEST_ISA)
    report["counts"] = counts.measure(device) if "compress" in chosen else []
    return report


def measure_op(subject: Subject, device: torch.device, quick: bool, deadline: float, report: dict[str, Any]) -> None:
    """Add the results of one op; what fails is reported as such, and the rest is still measured."""
    for workload in subject.workloads(device, quick):
        if time.monotonic() > deadline:
            report["left_out"].append(f"{subject.op} {workload.name}")
            continue
        print(f"{subject.op} {workload.name} ...", file=sys.stderr, flush=True)
        try:
            report["results"] += measure_workload(subject, workload, device, report["pairs"])
        except Exception as error:
            failed = {"op": subject.op, "workload": workload.name, "device": device.type, "backend": "all"}
            report["results"].append(failed | {"error": f"{type(error).__name__}: {error}"})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if subject.is_op and time.monotonic() < deadline:
        report["dispatch"].append(measure_dispatch(subject, device))


# --- what it ran on ----------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": device.type,
        "cpu": cpu_name(),
        "isa": BEST_ISA,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"l2_bytes": properties.L2_cache_size, "memory_bytes": properties.total_memory, "driver": driver()}
    found |= {"vtok": vtok.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    return found | {"triton": triton_version(), "python": platform.python_version(), "os": platform.platform()}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str | None:
    """The commit of the source tree, with "+" where it was changed; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or not (head := _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")):
        return None
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    return head + ("+" if changed else "")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def slug(machine: dict[str, Any]) -> str:
    name = machine["gpu"] if machine["device"] == "cuda" else f"cpu {machine['cpu']} {machine['isa']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- how it reads ------------------------------------------------------------------------------------------------


def row(result: dict[str, Any]) -> tuple[str, ...]:
    """One result as the cells of COLUMNS."""
    head = (result["op"], result["workload"], result["backend"])
    if problem := result.get("refused") or result.get("error"):
        return (*head, "–", "–", "–", "–", "–", problem)

    def cell(name: str, form: str) -> str:
        return form.format(result[name]) if name in result else "–"

    bars = "; ".join(result["missed"]) or "met"
    times = cell("vs_eager", "{:.2f}"), cell("vs_compile", "{:.2f}")
    return (*head, cell("us", "{:.1f}"), cell("gbs", "{:.1f}"), cell("share", "{:.0%}"), *times, bars)


def headline(report: dict[str, Any]) -> str:
    m = report["machine"]
    device = m.get("gpu") or f"{m['cpu']}, {m['isa']}, {m['threads']} threads"
    if m["device"] == "cpu" and (m["load"] or 0) > BUSY_LOAD:
        device += f", beside other work (load {m['load']:.1f})"
    versions = [f"{name} {m[name]}" for name in ("vtok", "torch", "triton", "cuda", "driver") if m.get(name)]
    return f"{device} · {' · '.join(versions)} · {report['date']} · commit {report['commit'] or 'unknown'}"


def remarks(report: dict[str, Any]) -> list[str]:
    """What the table can't hold: dispatch, what methods call, baselines that are missing and why, what was left out."""
    lines = []
    for d in report["dispatch"]:
        modes = ", ".join(f"{v:.1f} µs {mode}" for mode, v in d.items() if mode not in ("op", "device"))
        lines.append(f"dispatch of {d['op']}: {modes}")
    for r in report["results"]:
        if "launches" in r:
            count = "unknown" if r["launches"] is None else r["launches"]
            lines.append(
                f"{r['op']} {r['workload']} {r['backend']}: {count} launches, {r['host_us']:.1f} µs a call eagerly"
            )
    notes = {
        f"{r['op']} {r['workload']}: no {name}: {why}"
        for r in report["results"]
        for name, why in r.get("notes", {}).items()
    }
    left_out = [f"left out, out of time: {name}" for name in report["left_out"]]
    return lines + [counts.sentence(c) for c in report.get("counts", [])] + sorted(notes) + left_out


def show(report: dict[str, Any]) -> None:
    """The table, through rich where it is installed."""
    rows = [row(result) for result in report["results"]]
    print(headline(report))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(rows))
    else:
        table = Table(*COLUMNS, box=None, header_style="bold")
        for cells in rows:
            table.add_row(*cells)
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    print("\n".join(remarks(report)))


def plain(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in (COLUMNS, *rows)
    )


def to_markdown(report: dict[str, Any]) -> str:
    """The results page of a device."""
    lines = [f"# {report['machine'].get('gpu') or report['machine']['cpu']}", "", headline(report), ""]
    lines += [markdown_table(report["results"]), "", *(f"* {line}" for line in remarks(report)), ""]
    how = "share of the roof and ratios are medians of the paired ratios of {} interleaved rounds in one run."
    return "\n".join([*lines, f"Written by `python -m vtok.bench.report`; {how.format(report['pairs'])}", ""])


def markdown_table(results: list[dict[str, Any]]) -> str:
    rows = [COLUMNS, ("---",) * 3 + ("---:",) * 5 + ("---",), *map(row, results)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows)


def to_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def write(path: Path, text: str) -> None:
    """All of the file or nothing of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vtok bench", description=__doc__)
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP", help="ops, or whole methods as compress")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one by default")
    parser.add_argument("--quick", action="store_true", help="the smallest size of each op, fewer pairs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--force", action="store_true", help="replace FILE")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="also write FOLDER/<device>.json and .md")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="fail on results 15 %% behind those in OLD, or missing"
    )
    parser.add_argument("--seconds", type=float, help="start no measurement after so long")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
