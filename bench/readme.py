"""The README's performance table, from bench/results/*.json. Of each op the largest size, on the default backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtok.bench.report import headline, markdown_table


def largest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each op the result with the most bytes; the first backend of a workload is the default one."""
    best: dict[str, dict[str, Any]] = {}
    for result in results:
        if "us" in result and (result["op"] not in best or result["bytes"] > best[result["op"]]["bytes"]):
            best[result["op"]] = result
    return list(best.values())


def performance_table(folder: Path) -> str:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(f"{headline(report)}\n\n{markdown_table(largest(report['results']))}" for report in reports)
