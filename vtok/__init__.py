"""vtok compresses video tokens for video language models: score, decide, move."""

from __future__ import annotations

from vtok import ops
from vtok._version import __version__
from vtok.ops._rooms import backend_of

__all__ = ["__version__", "backend_of", "ops"]
