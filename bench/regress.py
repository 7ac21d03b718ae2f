"""Compares two reports: a result that fell behind by more than the threshold, or is missing, is a regression."""

from __future__ import annotations

from typing import Any

THRESHOLD = 0.15


def key(result: dict[str, Any]) -> str:
    return "/".join(result[part] for part in ("op", "workload", "device", "backend"))


def slowdown(old: dict[str, Any], new: dict[str, Any]) -> float:
    """How many times slower: by shares of the roof, each measured beside its own, else by microseconds."""
    if "share" in old and "share" in new:
        return old["share"] / new["share"]
    return new["us"] / old["us"]


def regressions(old: dict[str, Any], new: dict[str, Any], threshold: float = THRESHOLD) -> list[str]:
    """One sentence for each."""
    now = {key(result): result for result in new["results"] if "us" in result}
    found = []
    for before in old["results"]:
        if "us" not in before:
            continue
        after = now.get(key(before))
        if after is None:
            found.append(f"{key(before)}: expected a result, got none")
        elif (times := slowdown(before, after)) > 1 + threshold:
            found.append(f"{key(before)}: {times:.2f}× slower ({before['us']:.1f} µs, now {after['us']:.1f} µs)")
    return found


def report(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print them; the exit status."""
    found = regressions(old, new)
    print("\n".join(found) if found else f"no regression against {old['commit'] or 'the older report'}")
    return 1 if found else 0
