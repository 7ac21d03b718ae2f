"""vtok compresses video tokens for video language models: score, decide, move."""

from __future__ import annotations

from vtok import integrations, methods, ops
from vtok._version import __version__
from vtok.budget import plan
from vtok.compress import Compressor, compress
from vtok.decide import Plan
from vtok.draw import draw
from vtok.gate import gate_patches
from vtok.layout import Layout
from vtok.ops._rooms import backend_of
from vtok.packed import Packed
from vtok.rebuild import rebuild_patches
from vtok.stream import Stream

__all__ = [
    "Compressor",
    "Layout",
    "Packed",
    "Plan",
    "Stream",
    "__version__",
    "backend_of",
    "compress",
    "draw",
    "gate_patches",
    "integrations",
    "methods",
    "ops",
    "plan",
    "rebuild_patches",
]
