"""rlt, run-length tokenization: patches that differ from the step before, with the length of each run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtok import ops
from vtok.methods import Gated, register


@register("rlt", kind="gate")
def rlt(frames: Tensor, patch: tuple[int, int], tubelet: int, threshold: float | None, state: Any) -> Gated:
    """Keep a patch whose mean absolute difference is above the threshold (strictly); the first step whole.

    The last frame of a step is compared with the first of the step before. The release's threshold is 0.1 on pixels
    normalised by ImageNet's mean and deviation. Lengths are ``Packed.run_lengths``, in the order of the kept rows (the
    release returns them in another order than its tokens).

    Source: the released tokenizer of Run-Length Tokenization.
    """
    if threshold is None:
        return Gated(ops.patch_motion(frames, list(patch), tubelet, metric="l1", span="ends"))
    keep, score, *state = ops.motion_gate(
        frames, list(patch), threshold, tubelet, metric="l1", span="ends", reference="previous",
        state_frames=state and state[0], state_step=state and state[1],
    )  # fmt: skip
    return Gated(score, keep, state)
