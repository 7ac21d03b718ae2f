"""Stream: a video that comes in chunks gives the rows that it gives in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok import methods
from vtok.compress import compress, make_goal
from vtok.gate import PatchGate, gate_patches
from vtok.layout import upload, whole_number
from vtok.packed import Packed
from vtok.run_scan import SCANS, RunScan, State

AMOUNTS = ("threshold", "capacity", "min_per_frame")


class Stream:
    """Compress B videos while they arrive, a chunk of frames at a time, in constant memory.

    With a ``threshold`` and a gate method, ``temporal_merge`` or ``dtd`` the state is carried on: chunks of any lengths
    give bit for bit the rows of the video in one piece. A run of tokens comes out when it is over, so after rows that
    began later at other sites; ``flush`` closes those that are open. With a ``window`` each window of that many frames
    is a video of its own, so a ``budget`` counts per window; what fills no window yet waits.

    Args:
        method: a name in ``vtok.methods``.
        window: frames of a window, whole steps.
        settings: those of ``vtok.gate_patches`` for a gate method, of ``vtok.compress`` for another, but for
            ``residual``, as the row before may be long gone, and without a window for ``forced``, which names the steps
            of one video (``vtok.ops.motion_gate`` takes it chunk by chunk). A scan of runs takes its threshold and the
            method's options.

    Raises ValueError or TypeError for settings that do not go together.
    """

    def __init__(self, method: str = "grt", *, window: int | None = None, **settings: Any) -> None:
        self.gates = methods.get(method).kind == "gate"
        self.tubelet = settings.get("tubelet", 1) if self.gates else 1
        self.window = None if window is None else whole_number("window", window, least=1)
        carries = self.gates or method in SCANS
        if self.window is None and not (carries and settings.get("threshold") is not None):
            raise ValueError("expected a window, or a threshold and a method that carries its state on")
        if self.window is not None and self.window % self.tubelet:
            raise ValueError(f"expected a window of whole steps of {self.tubelet} frames, got {self.window}")
        if settings.get("residual"):
            raise ValueError("expected residual=False in a stream: the row before may be long gone")
        if self.window is None and settings.get("forced") is not None:
            raise ValueError("expected no forced in a stream without a window: every chunk would repeat its steps")
        self.method, self.settings = method, settings
        self._pending: Tensor | None = None
        self._step: Tensor | None = None
        self._state: State | None = None
        self._runs = self._gate = None
        if self.window is None and not self.gates:
            methods.get(method).check_options({k: v for k, v in settings.items() if k != "threshold"})
            self._runs = RunScan(**settings, **SCANS[method])
        elif self.window is None:
            self._amount: dict[str, Any] = {"capacity": None, "min_per_frame": 0}
            self._amount |= {name: settings[name] for name in AMOUNTS if name in settings}
            self._gate = PatchGate.of(method=method, **{k: v for k, v in settings.items() if k not in AMOUNTS})

    def push(self, x: Tensor) -> Packed:
        """The rows that the next frames give: [B, T, C, H, W] for a gate method, else tokens [B, T, (H, W or N,) D].

        Returns Packed of what is decided: of this chunk's whole steps, or, with a window, of every window that is now
        full, each a video of its own, a video's windows side by side. ``index`` counts the rows of that piece;
        ``positions`` hold the time since the stream began, or since its row was reset; ``run_lengths`` end with the
        piece, for what comes next is not known. T may be 0. Where it raises, the stream stays as it was. Never syncs.
        """
        self._expect_alike(x)
        chunk = x
        if self._pending is not None:
            x = torch.cat([self._pending, x], 1)
        step = self.window or self.tubelet
        whole = x.shape[1] // step * step
        packed = self._take(x[:, :whole], step)
        last = chunk if whole else x  # what waits after whole steps is of this chunk alone, its gradient too
        waiting = last[:, last.shape[1] - (x.shape[1] - whole) :]
        self._pending = waiting.clone(memory_format=torch.contiguous_format)  # not a view, which would hold the chunk
        return packed

    def flush(self) -> Packed:
        """The rows of what still waits; then the stream begins anew. A step is filled up with its last frame."""
        if self._pending is None:
            raise ValueError("expected frames before the flush, got none since the stream began")
        x = self._pending
        missing = -x.shape[1] % self.tubelet
        x = torch.cat([x, x[:, -1:].expand(-1, missing, *x.shape[2:])], 1)
        packed = self._take(x, max(x.shape[1], self.tubelet), closing=True)
        self.reset()
        return packed

    def reset(self, videos: Sequence[int] | None = None) -> None:
        """Begin anew: all videos, or the given rows of the batch, which then begin between two chunks.

        What is open at their sites is forgotten, not returned. ValueError for a row that the batch does not have.
        """
        if videos is None:
            self._pending, self._step, self._state = None, None, None
            return
        if self._pending is not None and self._pending.shape[1]:
            raise ValueError(f"expected no frames waiting at a reset of single videos, got {self._pending.shape[1]}")
        if self._step is None:
            return
        given = videos.tolist() if isinstance(videos, Tensor) else videos
        chosen = [whole_number("videos", video, least=0) for video in given]
        if chosen and max(chosen) >= self._step.shape[0]:
            raise ValueError(f"expected videos in [0, {self._step.shape[0]}), got {max(chosen)}")
        rows = torch.zeros_like(self._step, dtype=torch.bool)
        rows[upload(chosen, rows.device)] = True
        self._step = self._step.masked_fill(rows, 0)
        if self._state is not None:
            self._state["seen"] = self._state["seen"].masked_fill(rows, 0)
        if self._state is not None and "count" in self._state:
            count = self._state["count"].unflatten(0, (rows.shape[0], -1))
            self._state["count"] = count.masked_fill(rows[:, None], 0).flatten()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next chunk depends on, as tensors."""
        state = {"pending": self._pending, "step": self._step, **(self._state or {})}
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where another stream of the same settings stood."""
        carried = {"rows", "length", "seen", "total", "count", "head"} if self._runs else {"reference", "seen"}
        own = set(state) - {"pending", "step"}
        if (own and (own != carried or self.window)) or len(own & set(state)) + 2 * ("step" in state) != len(state):
            raise ValueError(f"expected what state_dict() returned, got {sorted(state)}")
        self._pending, self._step = state.get("pending"), state.get("step")
        self._state = {name: state[name] for name in carried} if own else None

    def _expect_alike(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() < 4:
            raise ValueError(f"expected a chunk [B, T, ...], got {tuple(getattr(x, 'shape', ()))}")
        if self._pending is not None:
            before, now = self._pending, x
            alike = (before.shape[:1], before.shape[2:], before.dtype, before.device)
            if alike != (now.shape[:1], now.shape[2:], now.dtype, now.device):
                raise ValueError(
                    f"expected chunks like the first, {before.dtype} {tuple(before.shape)} but for the frames, "
                    f"got {now.dtype} {tuple(now.shape)}"
                )

    def _take(self, x: Tensor, step: int, closing: bool = False) -> Packed:
        """Decide about whole steps or windows."""
        videos, frames = x.shape[:2]
        start = x.new_zeros(videos, dtype=torch.int64) if self._step is None else self._step
        packed, state = self._decide(x, step, start, closing)
        self._step, self._state = start + frames // self.tubelet, state  # both or, where that raised, neither
        return packed

    def _decide(self, x: Tensor, step: int, begin: Tensor, closing: bool) -> tuple[Packed, State | None]:
        """The rows of frames that begin at the times int64 [B], and the state after them."""
        if self._runs is not None:
            return self._runs(x, self._state, begin, closing)
        if self._gate is not None:
            goal = make_goal(self._gate.layout(x), None, None, **self._amount)
            before = self._state and [self._state["reference"], self._state["seen"]]
            packed, after = self._gate(x, goal, self._amount["threshold"], before)
            return _moved(packed, begin), dict(zip(("reference", "seen"), after, strict=True))
        pieces = x.shape[1] // step
        x = x.reshape(x.shape[0] * pieces, step, *x.shape[2:])
        packed = (gate_patches if self.gates else compress)(x, method=self.method, **self.settings)
        own = torch.arange(pieces, dtype=torch.int64, device=x.device) * (step // self.tubelet)
        return _moved(packed, (begin[:, None] + own).flatten()), None


def _moved(packed: Packed, begin: Tensor) -> Packed:
    """The same with the times counted from ``begin`` int64 [V]."""
    if packed.layout.videos:
        times = torch.where(packed.index >= 0, begin[packed.layout.video_of(packed.index)], 0)
        packed._positions = packed.positions + torch.nn.functional.pad(times[:, None], (0, 2))
    return packed
