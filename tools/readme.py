"""Writes the generated parts of README.md, between their markers, from the code. `--check` only compares."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path

import vtok
from vtok.bench.readme import performance_table
from vtok.ops._rooms import ROOMS

README = Path(__file__).resolve().parent.parent / "README.md"


def sentences(docstring: str) -> str:
    return " ".join(inspect.cleandoc(docstring).split()).replace("``", "`")


def op_row(name: str) -> str:
    doc = inspect.getdoc(getattr(vtok.ops, name)) or ""
    text = sentences(doc)
    what = doc.splitlines()[0].rstrip(".").replace("``", "`")
    exact = re.search(r"Class ([ET])", text)
    differentiable = re.search(r"(?<!Not )Differentiable in ([^.,:(]*)", text)
    takes = ROOMS[name].SCHEMA[len(name) : ROOMS[name].SCHEMA.index(" ->")]
    names = [p.split()[-1].split("=")[0] for p in takes.strip("()").split(",") if p.strip() != "*"]
    cells = [
        f"`{name}({', '.join(names)})`",
        what,
        exact.group(1) if exact else "",
        differentiable.group(1).strip() if differentiable else "no",
        "yes" if "apturable" in text else "no",
    ]
    return "| " + " | ".join(cells) + " |"


def ops_table() -> str:
    head = "| op | what it does | class | differentiable in | CUDA graphs |\n|---|---|---|---|---|"
    return "\n".join([head, *map(op_row, sorted(ROOMS))])


def first_line(method: str) -> str:
    """What the method's module says of it, without its name in front."""
    line = (vtok.methods.get(method).module.__doc__ or "").partition("\n")[0]
    return line.removeprefix(f"{method}: ").rstrip(".")


def methods_table() -> str:
    head = "| method | what it keeps |\n|---|---|"
    rows = [f"| `{name}` | {first_line(name)} |" for name in vtok.methods.names()]
    return "\n".join([head, *rows])


def gating_table() -> str:
    """What tools/gating.py measured."""
    measured = json.loads((README.parent / "docs" / "gating.json").read_text(encoding="utf-8"))
    whole = measured["flops"]
    rows = [
        f"| {gate['threshold']:g} | {gate['kept']:.0%} | {gate['flops'] / 1e12:.1f} of {whole / 1e12:.1f} | "
        f"{1 - gate['flops'] / whole:.0%} | {gate['psnr']:.1f} |"
        for gate in measured["gates"]
    ]
    head = "| threshold | patches kept | TFLOPs of SigLIP so400m | saved | PSNR of the carried clip, dB |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def render(text: str) -> str:
    performance = performance_table(README.parent / "bench" / "results")
    for name, body in {
        "ops": ops_table(),
        "methods": methods_table(),
        "gating": gating_table(),
        "performance": performance,
    }.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
        assert pattern.search(text), f"README.md: expected the markers of {name}, got none"
        text = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    old = README.read_text()
    new = render(old)
    if parser.parse_args().check:
        sys.exit(None if new == old else "README.md: expected the generated tables, got others; run tools/readme.py")
    README.write_text(new)


if __name__ == "__main__":
    main()
