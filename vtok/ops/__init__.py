"""The ops: tensors in, tensors out. ``vtok.ops.X`` and ``torch.ops.vtok.X`` are the same op.

Each module here is one room: SCHEMA, the public function of the same name, ``reference`` in plain PyTorch, ``fake``,
and ``setup_context``/``backward`` where the op is differentiable. Modules are found, never listed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtok.ops import _rooms

_rooms.register_all()
__all__ = sorted(_rooms.ROOMS)
globals().update({name: getattr(room, name) for name, room in _rooms.ROOMS.items()})


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from collections.abc import Callable

    def __getattr__(name: str) -> Callable: ...  # the ops are found at run time, where no type checker sees them
