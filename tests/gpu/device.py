"""What the GPU tests share. As a script it runs ops by themselves, in a process that may die of what they do:

    python tests/gpu/device.py [--wild] [op ...]

under compute-sanitizer, and from test_gpu.py with --wild: every int64 tensor then holds values far out of range."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rooms import Case, all_cases, check, op_of, outputs

DEVICE = torch.device("cuda", 0)


def on_device(args: tuple, device: torch.device = DEVICE) -> tuple:
    return tuple(a.detach().to(device) if isinstance(a, torch.Tensor) else a for a in args)


def on_host(result) -> tuple[torch.Tensor, ...]:
    return tuple(t.cpu() for t in outputs(result))


def cases_of(op: str) -> list[Case]:
    return [case for name, case in all_cases() if name == op]


def largest(op: str, count: int) -> list[Case]:
    size = lambda case: sum(a.numel() for a in case.args if isinstance(a, torch.Tensor))  # noqa: E731
    return sorted(cases_of(op), key=size)[-count:]


def wild(args: tuple) -> tuple:
    """The same shapes, each int64 tensor with values that no tensor has room for."""
    return tuple(
        torch.randint_like(a, -(2**40), 2**40) if isinstance(a, torch.Tensor) and a.dtype == torch.int64 else a
        for a in args
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--wild", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    for op in options.ops or sorted({name for name, _ in all_cases()}):
        for case in largest(op, 4):
            args = on_device(wild(case.args) if options.wild else case.args)
            got = on_host(op_of(op)(*args, **case.kwargs))  # the copy to the host waits, and raises what went wrong
            if not options.wild:
                check(op, got, case)
        print(op, "ok")


if __name__ == "__main__":
    main()
