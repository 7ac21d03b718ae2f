"""Triton's interpreter: chosen before any kernel is imported, so these tests have a process of their own."""

from __future__ import annotations

import os
import sys

assert not any(name.startswith("vtok.triton_kernels.") for name in sys.modules), "run tests/triton by itself"
os.environ["TRITON_INTERPRET"] = "1"
