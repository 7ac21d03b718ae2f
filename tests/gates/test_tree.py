"""What every committed file keeps to."""

from __future__ import annotations

import re
import subprocess

import pytest

from rooms import ROOT

MACHINE_PATH = re.compile(r"(?<![\w.>}])/(?:tmp|work|home|root|Users|mnt|var/tmp)/\w")


def committed_texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content:
            texts[name] = content.decode()
    return texts


def test_no_machine_paths():
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in committed_texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_a_machine_path_is_noticed():
    assert MACHINE_PATH.search("open('/" + "tmp/x')") and MACHINE_PATH.search("see /" + "home/me")
    assert not MACHINE_PATH.search("build/tmp/x") and not MACHINE_PATH.search("https://a.b/home/x")


def test_the_linters_have_one_version():
    """.pre-commit-config.yaml and requirements-dev.txt name the same ruff and clang-format."""
    hooks = re.findall(
        r"repo: \S+/(?:mirrors-)?([\w-]+?)(?:-pre-commit)?\n\s+rev: v(\S+)",
        committed_texts()[".pre-commit-config.yaml"],
    )
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", committed_texts()["requirements-dev.txt"], re.M))
    assert dict(hooks) == {tool: pins[tool] for tool in ("ruff", "clang-format")}
