"""What the README says is what the code says."""

from __future__ import annotations

import importlib.util

from rooms import ROOT


def test_readme_tables_are_generated():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text()
    assert module.render(text) == text, "run tools/readme.py"
