"""``vtok`` and ``python -m vtok``."""

from __future__ import annotations

import io
import sys

EXTRA = {"typer", "click", "rich", "av", "PIL", "safetensors"}


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names hold what a terminal may not spell
            stream.reconfigure(errors="backslashreplace")
    try:
        from vtok.cli import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        if sys.argv[1:] == ["info"]:
            from vtok.info import text

            print(text())
            return
        print(f'vtok: {error.name} is missing; pip install "vtok[cli]"', file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
