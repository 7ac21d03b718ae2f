"""Triton's interpreter: chosen when torch imports triton, so these tests have a process of their own."""

from __future__ import annotations

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/triton with TRITON_INTERPRET=1, as make test-triton does"
