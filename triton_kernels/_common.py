"""What the Triton rooms share."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.runtime.driver import driver


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 (float64) to the storage dtype, to nearest even. bf16 is spelled out: Triton's interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


def all_registers() -> dict[str, int]:
    """The launch option that lets ptxas take every register: it would rather spill a few bytes to fit more threads."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted or driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": 255}
