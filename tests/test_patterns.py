"""Keep patterns, against what the original returned (golden/pixels/residualvit_patterns__*)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtok.patterns import center, interleave, residualvit_count, uniform

GOLDEN = Path(__file__).with_name("golden")
CASES = {case["name"]: case for case in json.loads((GOLDEN / "pixels" / "residualvit.json").read_text())["cases"]}


@pytest.mark.parametrize("name", CASES)
def test_patterns_of_the_original(name):
    golden, params = np.load(GOLDEN / CASES[name]["file"], allow_pickle=False), CASES[name]["params"]
    sites, side = params["patches"], math.isqrt(params["patches"])
    k = residualvit_count(sites, params["drop_prob"])
    assert k == params["kept"]
    assert uniform(sites, k) == golden["out_uniform"].tolist()
    assert center(side, side, k, compat="residualvit") == golden["out_center"].tolist()


@given(st.integers(1, 5000), st.data())
def test_uniform_is_the_integer_linspace(sites, data):
    k = data.draw(st.integers(0, sites))
    assert uniform(sites, k) == torch.linspace(0, sites - 1, k, dtype=torch.int64).tolist()


def test_uniform_of_few():
    assert uniform(0, 0) == uniform(7, 0) == []
    assert uniform(7, 1) == [0]
    assert uniform(7, 2) == [0, 6]
    assert uniform(7, 7) == list(range(7))


def test_center():
    assert center(4, 4, 4) == [5, 6, 9, 10]
    assert center(4, 4, 4, compat="residualvit") == [2, 5, 6, 9]
    assert center(7, 7, 9) == [16, 17, 18, 23, 24, 25, 30, 31, 32]
    assert center(7, 7, 9, compat="residualvit") == [10, 16, 17, 18, 23, 24, 25, 30, 31]
    assert center(7, 7, 7) == [16, 17, 18, 23, 24, 25, 31]  # four corners tie: the lower two stay
    assert center(2, 6, 2) == [2, 3]  # of the four in the middle
    assert center(3, 5, 3) == [2, 6, 7]  # above, left and the middle itself
    assert center(0, 5, 0) == []


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_center_keeps_the_nearest(high, wide, data):
    k = data.draw(st.integers(0, high * wide))
    kept = center(high, wide, k)
    y, x = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    distance = ((y - (high - 1) / 2) ** 2 + (x - (wide - 1) / 2) ** 2).flatten().double()
    assert kept == distance.argsort(stable=True)[:k].sort().values.tolist()


def test_counts():
    assert [residualvit_count(p, 0.85) for p in (49, 196, 256)] == [7, 29, 38]
    assert [residualvit_count(p, 0.85, training=True) for p in (49, 196, 256)] == [7, 29, 38]
    assert residualvit_count(30, 0.85) == 4  # 4.5 in float32, half to even; 4.500000000000001 in float64
    assert residualvit_count(5, 0.5) == residualvit_count(5, 0.5, training=True) == 2
    assert (residualvit_count(7, 0.5), residualvit_count(7, 0.5, training=True)) == (4, 3)
    assert residualvit_count(4, 0.95) == residualvit_count(4, 0.95, training=True) == 1
    assert residualvit_count(9, 0) == 9


def test_interleave():
    assert interleave(7, 3) == [0, 3, 6]
    assert interleave(4, 1) == [0, 1, 2, 3]
    assert interleave(0, 3) == []


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: uniform(4, 5), ValueError, "expected k of at most 4 sites, got 5"),
        (lambda: uniform(-1, 0), ValueError, "expected sites of at least 0, got -1"),
        (lambda: uniform(4, 1.5), TypeError, "expected k as an integer, got 1.5"),
        (lambda: center(2, 2, 5), ValueError, "expected k of at most 4 sites, got 5"),
        (lambda: center(2, 3, 1, compat="residualvit"), ValueError, "expected a square grid .*, got 2x3"),
        (lambda: center(2, 2, 1, compat="vllm"), ValueError, "expected compat None or 'residualvit', got 'vllm'"),
        (lambda: residualvit_count(4, 1.0), ValueError, r"expected drop in \[0, 1\), got 1.0"),
        (lambda: residualvit_count(0, 0.5), ValueError, "expected sites of at least 1, got 0"),
        (lambda: interleave(4, 0), ValueError, "expected clip of at least 1, got 0"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
