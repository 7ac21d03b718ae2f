"""merge: what only it promises. The contract tests run over cases() by themselves.

The arithmetic is pinned (sums from +0 in list order, one division, one rounding), so the contract tests compare bit for
bit; sequential() below is that rule as a loop.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import vtok
from vtok import _load
from vtok.ops._rooms import ROOMS

from rooms import FLOATS, Case, Error, from_numpy, generator, poisoned, randn, same_bits, to_numpy

REDUCES = ("mean", "sum", "max")


def index(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def lists(rows: int, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random members, -1 among them, for groups of these sizes, and a few places that no group reads."""
    total = sum(sizes)
    members = torch.randint(-1, rows, (total + 2,), generator=generator(rows, sizes))
    return members, index([0, *np.cumsum(sizes)])


def uniform(rows: int, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(rows, generator=generator("weights", rows), dtype=torch.float32).to(dtype)


def cases() -> list[Case]:
    shapes = [(3, 1, [2, 3]), (9, 77, [0, 1, 9, 4]), (40, 256, [40, 0, 1, 70])]
    made = [
        Case(
            f"{s}x{d}-{reduce}-{str(dtype)[6:]}", (randn((s, d), dtype), *lists(s, sizes), weights), {"reduce": reduce}
        )
        for (s, d, sizes), reduce, weights in zip(shapes, REDUCES, (None, uniform(9), uniform(40)), strict=True)
        for dtype in FLOATS
    ]
    x, nan = randn((6, 40), torch.bfloat16), randn((6, 18), torch.float32)
    nan[1, ::2] = float("nan")
    nan[2] = -0.0
    one_each = index(range(6)), index(range(7))
    return [
        *made,
        Case("mean-weights", (x.float(), *lists(6, [7, 0, 30]), uniform(6)), {"reduce": "mean"}),
        Case("more-groups-than-a-block", (randn((20, 130), torch.float16), *lists(20, [2] * 19))),
        Case("float64", (x.double(), *lists(6, [7, 0, 3]), uniform(6, torch.float64)), {"reduce": "mean"}),
        Case("one-each", (x, *one_each)),
        Case("no-groups", (x, index([0, 1]), index([0]))),
        Case("no-members", (x, index([]), index([0, 0, 0])), {"reduce": "max"}),
        Case("no-rows", (x[:0], index([-1, -1]), index([0, 1, 2]))),
        Case("no-columns", (x[:, :0], *lists(6, [2, 3]), uniform(6))),
        Case("only-padding", (x, index([-1, -1, 4]), index([0, 2, 3])), {"reduce": "max"}),
        Case(
            "signed-zeros",
            (torch.tensor([[-0.0] * 9, [0.0] * 9]), index([0, 1, 1, 0]), index([0, 2, 4])),
            {"reduce": "max"},
        ),
        Case("weights-zero", (x, index([0, 1, 2, 3]), index([0, 2, 4]), torch.tensor([0, 0, 2.0, 1, 0, 0]))),
        *(Case(f"nan-{reduce}", (nan, *lists(6, [3, 4, 1]), uniform(6)), {"reduce": reduce}) for reduce in REDUCES),
    ]


def grad_cases() -> list[Case]:
    tokens = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()
    made = index([4, -1, 0, 0, 2, 3, 1, 2]), index([0, 4, 4, 5, 7])  # a repeat, an empty group, an unread place
    return [
        Case(f"{reduce}-{name}", (tokens, *lists, w), {"reduce": reduce})
        for reduce in REDUCES
        for name, lists in {
            "lists": made,
            "empty": (index([]), index([0, 0])),
            "none": (index([1]), index([0])),
        }.items()
        for w in (None, weights)
    ]


def errors() -> list[Error]:
    x, members, offsets = torch.randn(5, 7), index([0, 1]), index([0, 1, 2])
    return [
        Error("vtok::merge: expected tokens of shape (S, D), got (7,)", (x[0], members, offsets)),
        Error(
            "vtok::merge: expected tokens of dtype float32, float16, bfloat16 or float64, got int64",
            (x.long(), members, offsets),
        ),
        Error("vtok::merge: expected members of shape (M,), got (1, 2)", (x, members[None], offsets)),
        Error("vtok::merge: expected offsets of dtype int64, got int32", (x, members, offsets.int())),
        Error("vtok::merge: expected offsets of shape (K+1,), got (0,)", (x, members, offsets[:0])),
        Error("vtok::merge: expected weights of shape (S,), got (5, 1)", (x, members, offsets, torch.ones(5, 1))),
        Error("vtok::merge: expected weights of shape (S,)=(5,), got (4,)", (x, members, offsets, torch.ones(4))),
        Error(
            "vtok::merge: expected weights of dtype float32, got float16",
            (x, members, offsets, torch.ones(5, dtype=torch.float16)),
        ),
        Error(
            "vtok::merge: expected weights of dtype float64, got float32", (x.double(), members, offsets, torch.ones(5))
        ),
        Error(
            "vtok::merge: expected reduce to be mean, sum or max, got median",
            (x, members, offsets),
            {"reduce": "median"},
        ),
        Error(
            "vtok::merge: expected members in [-1, 5), got 2 values outside",
            (x, index([5, -2]), offsets),
            only_cpu=True,
        ),
        Error(
            "vtok::merge: expected offsets ascending from 0 to at most M=2, got offsets[2]=1",
            (x, members, index([0, 2, 1])),
            only_cpu=True,
        ),
    ]


def host(kernels, tokens, members, offsets, weights=None, *, reduce="mean"):
    groups = offsets.shape[0] - 1
    accumulator = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    values, weight = poisoned((groups, tokens.shape[1]), tokens.dtype), poisoned((groups,), accumulator)
    if groups:
        getattr(kernels, f"merge_{str(tokens.dtype)[6:]}")(
            to_numpy(tokens), *tokens.shape, tokens.shape[1], to_numpy(members), members.shape[0], to_numpy(offsets),
            groups, None if weights is None else to_numpy(weights), reduce == "mean", reduce == "max", values, weight,
        )  # fmt: skip
    return from_numpy(values, tokens.dtype), from_numpy(weight, accumulator)


def sequential(tokens, members, offsets, weights=None, *, reduce="mean"):
    """The rule, one member at a time in list order. float64 tokens make it the exact answer, nearly."""
    accumulator = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    groups = offsets.shape[0] - 1
    values, weight = torch.zeros(groups, tokens.shape[1], dtype=accumulator), torch.zeros(groups, dtype=accumulator)
    for g in range(groups):
        rows = [row for row in members[offsets[g] : offsets[g + 1]].tolist() if row >= 0]
        for place, row in enumerate(rows):
            x, w = tokens[row].to(accumulator), torch.ones((), dtype=accumulator) if weights is None else weights[row]
            weight[g] += w
            larger = (x > values[g]) | x.isnan() | (place == 0)
            values[g] = torch.where(larger, x, values[g]) if reduce == "max" else values[g] + x * w
        if reduce == "mean":
            values[g] = torch.where(weight[g] == 0, 0, values[g] / weight[g])
    return values.to(tokens.dtype), weight


def backends(kernels):
    return {"op": vtok.ops.merge, "reference": ROOMS["merge"].reference, "host": lambda *a, **k: host(kernels, *a, **k)}


def check_all(kernels, want, *args, **kwargs):
    for name, run in backends(kernels).items():
        assert all(map(same_bits, run(*args, **kwargs), want)), name


@pytest.fixture(params=[isa for isa in ("portable", "avx2", "avx512") if _load.cpu_isa(isa) == isa])
def isa(request):
    before = _load.cpu_isa()
    _load.cpu_isa(request.param)
    yield request.param
    _load.cpu_isa(before)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_sequential(case, host_kernels):
    """Every backend is the loop, bit for bit: not another order, not a contracted product."""
    check_all(host_kernels, sequential(*case.args, **case.kwargs), *case.args, **case.kwargs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_close_to_float64(reduce, dtype):
    """n additions of float32 and one rounding to the dtype away from the answer, at most."""
    tokens, weights, (members, offsets) = randn((50, 33), dtype), uniform(50), lists(50, [1, 300, 7])
    values, weight = vtok.ops.merge(tokens, members, offsets, weights, reduce=reduce)
    wide = tokens.double(), members, offsets, weights.double()
    exact, exact_weight = sequential(*wide, reduce=reduce)
    size, _ = sequential(wide[0].abs(), *wide[1:], reduce=reduce)  # the sum of |w x|, over W for means
    n = offsets.diff()[:, None] + 3
    bound = 2 * n * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((values.double() - exact).abs() <= bound).all()
    assert ((weight.double() - exact_weight).abs() <= n[:, 0] * 2.0**-24 * exact_weight).all()


@settings(deadline=None, max_examples=25)
@given(data=st.data(), sizes=st.lists(st.integers(0, 12), max_size=6), width=st.integers(0, 70))
def test_any_lists(data, sizes, width):
    rows = data.draw(st.integers(1, 9))
    members = index(data.draw(st.lists(st.integers(-1, rows - 1), min_size=sum(sizes), max_size=sum(sizes))))
    tokens = randn((rows, width), data.draw(st.sampled_from(FLOATS)))
    weights = data.draw(st.sampled_from([None, uniform(rows)]))
    args, reduce = (tokens, members, index([0, *np.cumsum(sizes)]), weights), data.draw(st.sampled_from(REDUCES))
    assert all(map(same_bits, vtok.ops.merge(*args, reduce=reduce), sequential(*args, reduce=reduce)))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("reduce", REDUCES)
def test_one_group_of_everything(isa, reduce, dtype):
    """A long list: sums outlive a batch of members and, for the wide row, a block of columns."""
    for rows, width in ((1500, 70), (21, 4200)):
        tokens = randn((rows, width), dtype)
        args = tokens, index(range(rows)), index([0, rows]), uniform(rows, torch.promote_types(dtype, torch.float32))
        assert all(map(same_bits, vtok.ops.merge(*args, reduce=reduce), sequential(*args, reduce=reduce)))


def test_long_run_of_equal_rows(isa, host_kernels):
    """200 equal bf16 rows: a sum kept in bf16 would be off by a tenth."""
    tokens = randn((1, 256), torch.bfloat16).expand(200, 256).contiguous()
    check_all(host_kernels, (tokens[:1], torch.tensor([200.0])), tokens, index(range(200)), index([0, 200]))


def test_merges_and_unmerges_piecewise_constant_rows():
    sizes = index([1, 7, 2, 40, 3])
    assignment = torch.arange(5).repeat_interleave(sizes)
    tokens = randn((5, 77), torch.bfloat16)[assignment]
    offsets = torch.cat([index([0]), sizes.cumsum(0)])
    for reduce in ("mean", "max"):
        values, _ = vtok.ops.merge(tokens, index(range(53)), offsets, reduce=reduce)
        assert same_bits(values[assignment], tokens)


def test_two_rounds_equal_one():
    """Sizes carried from round to round; integers, and powers of two to divide by, so that nothing rounds."""
    tokens = torch.randint(-8, 8, (16, 40), generator=generator("rounds")).float()
    first, size = vtok.ops.merge(tokens, index(range(16)), index([0, 4, 5, 6, 8, 16]))
    assert size.tolist() == [4, 1, 1, 2, 8]
    values, weight = vtok.ops.merge(first, index([4, 0, 1, 2, 3]), index([0, 1, 5]), size)
    want, sizes = vtok.ops.merge(tokens, index([*range(8, 16), *range(8)]), index([0, 8, 16]))
    assert torch.equal(values, want) and torch.equal(weight, sizes)


def test_no_weights_are_ones():
    for case in cases():
        tokens, members, offsets, *_ = case.args
        ones = torch.ones(tokens.shape[0], dtype=torch.promote_types(tokens.dtype, torch.float32))
        got = vtok.ops.merge(tokens, members, offsets, ones, **case.kwargs)
        assert all(map(same_bits, got, vtok.ops.merge(tokens, members, offsets, **case.kwargs)))


def test_overflow_is_infinity(isa, host_kernels):
    tokens = torch.full((40, 50), 60000.0).half()
    for reduce, value in {"sum": torch.inf, "mean": 60000.0}.items():
        want = torch.full((1, 50), value).half(), torch.tensor([40.0])
        check_all(host_kernels, want, tokens, index(range(40)), index([0, 40]), reduce=reduce)


def test_lists_are_not_trusted_on_devices(host_kernels):
    """Kernels clamp offsets and skip members that name no row; the CPU raises instead (errors())."""
    tokens = randn((6, 40), torch.bfloat16)
    members, offsets = index([0, 6, 1, -7, 2**40, 5]), index([-3, 3, 1, 2, 99])
    want = sequential(tokens, index([0, 1, 1, 5]), index([0, 2, 2, 2, 4]))  # places [0, 3), [3, 1), [1, 2), [2, 6)
    assert all(map(same_bits, host(host_kernels, tokens, members, offsets), want))


def test_threads_do_not_matter():
    args = randn((900, 300), torch.bfloat16), *lists(900, [1, 700, 0, 5, 90] * 3), uniform(900)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = vtok.ops.merge(*args)
        torch.set_num_threads(max(threads, 2))
        assert all(map(same_bits, vtok.ops.merge(*args), want))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("column", range(1, 4))
def test_unaligned_rows(host_kernels, column):
    """Rows that start off a 16-byte boundary take a narrower word, not a fault."""
    flat = randn((200,), torch.bfloat16)
    tokens = flat[column : column + 128].view(4, 32)
    values, weight = poisoned((1, 32), torch.bfloat16), poisoned((1,), torch.float32)
    places = to_numpy(index([3, 1])), 2, to_numpy(index([0, 2]))
    host_kernels.merge_bfloat16(
        flat.view(torch.int16).numpy()[column:], 4, 32, 32, *places, 1, None, True, False, values, weight
    )
    assert same_bits(from_numpy(values, torch.bfloat16), sequential(tokens, index([3, 1]), index([0, 2]))[0])


def test_more_than_2_31_elements(host_kernels):
    """Row offsets are 64-bit: a strided view whose last row lies beyond 2^31 elements."""
    buffer, stride = np.zeros(2**31 + 64, dtype=np.int16), 2**30 + 8  # pages of zeros cost nothing until written
    tokens = from_numpy(buffer, torch.bfloat16).as_strided((3, 32), (stride, 1))
    tokens[2] = torch.arange(32)
    members, offsets = index([2, 0, 2]), index([0, 1, 3])
    want = torch.stack([torch.arange(32), torch.arange(32) / 2]).bfloat16(), torch.tensor([1.0, 2.0])
    assert all(map(same_bits, vtok.ops.merge(tokens, members, offsets), want))
    values, weight = poisoned((2, 32), torch.bfloat16), poisoned((2,), torch.float32)
    places = to_numpy(members), 3, to_numpy(offsets)
    host_kernels.merge_bfloat16(buffer, 3, stride, 32, *places, 2, None, True, False, values, weight)
    assert same_bits(from_numpy(values, torch.bfloat16), want[0])


def test_gradient_of_a_maximum_goes_to_the_first():
    tokens = torch.tensor([[1.0, 2, float("nan")], [1, 3, 0], [0, 3, float("nan")]], requires_grad=True)
    values, _ = vtok.ops.merge(tokens, index([2, 1, 0]), index([0, 3]), reduce="max")
    values.backward(torch.tensor([[1.0, 2, 4]]))
    assert tokens.grad.tolist() == [[0, 0, 0], [1, 0, 0], [0, 2, 4]]


@pytest.mark.parametrize("reduce", REDUCES)
def test_gradients_keep_dtypes(reduce):
    tokens, weights = randn((6, 8), torch.bfloat16).requires_grad_(), uniform(6).requires_grad_()
    values, weight = vtok.ops.merge(tokens, *lists(6, [3, 0, 4]), weights, reduce=reduce)
    (values.float().sum() + weight.sum()).backward()
    assert tokens.grad.dtype == torch.bfloat16 and weights.grad.dtype == torch.float32
