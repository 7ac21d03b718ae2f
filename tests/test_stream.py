"""Stream: chunks of any lengths give the rows of the whole."""

from __future__ import annotations

import gc
import weakref
from itertools import combinations

import pytest
import torch

from vtok import Stream, compress, gate_patches


def moving(videos=2, frames=12, tubelet=1):
    """Noise of which every patch of 4 pixels changes now and then, and drifts."""
    x = torch.randint(0, 200, (videos, 1, 2, 8, 12), dtype=torch.uint8).repeat(1, frames, 1, 1, 1)
    jumps = (torch.rand(videos, frames, 1, 2, 3) < 0.3).repeat_interleave(4, 3).repeat_interleave(4, 4)
    return x + (jumps.cumsum(1) * 5).to(torch.uint8) + torch.arange(frames, dtype=torch.uint8)[:, None, None, None]


def rows_of(pieces, videos):
    """(positions, values) of each video, over all pieces."""
    found = [[] for _ in range(videos)]
    for piece in pieces:
        bounds, per = piece.cu_seqlens.tolist(), piece.layout.videos // videos if videos else 0
        for v in range(piece.layout.videos):
            rows = slice(bounds[v], bounds[v + 1])
            found[v // per] += [
                (*p.tolist(), x) for p, x in zip(piece.positions[rows], piece.values[rows], strict=True)
            ]
    return found


def same(a, b):
    return [[r[:3] for r in v] for v in a] == [[r[:3] for r in v] for v in b] and all(
        torch.equal(x[3], y[3]) for v, u in zip(a, b, strict=True) for x, y in zip(v, u, strict=True)
    )


def chunks(x, cuts):
    return [part for part in torch.tensor_split(x, list(cuts), 1)]


METHODS = [
    {"method": "grt", "threshold": 20.0},
    {"method": "grt", "threshold": 0.05, "metric": "ssim", "refresh": 5},
    {"method": "grt", "threshold": 9.0, "reference": "previous"},
    {"method": "grt", "threshold": 9.0, "reference": "previous", "search": 2, "refresh": 5},
    {"method": "rlt", "threshold": 2.0},
    {"method": "dtd_pixel", "threshold": 3.0},
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: " ".join(map(str, s.values())))
def test_split_anywhere(settings):
    x = moving()
    whole = rows_of([gate_patches(x, patch=4, **settings)], 2)
    assert 6 * 2 < sum(map(len, whole)) < 12 * 6 * 2
    for cuts in [c for n in (1, 2) for c in combinations(range(13), n)] + [tuple(range(1, 12)), (5, 5, 5)]:
        stream = Stream(patch=4, **settings)
        assert same(rows_of([stream.push(part) for part in chunks(x, cuts)], 2), whole), cuts


@pytest.mark.parametrize("length", range(1, 13))
def test_steps_of_two_frames_wait_for_the_second(length):
    x = moving(frames=length)
    stream = Stream(patch=4, threshold=20.0, tubelet=2)
    pieces = [stream.push(frame) for frame in x.split(1, 1)]
    assert [p.layout.total for p in pieces] == [0 if t % 2 == 0 else 12 for t in range(length)]
    full = torch.cat([x, x[:, -1:]], 1) if length % 2 else x
    whole = gate_patches(full, patch=4, threshold=20.0, tubelet=2)
    assert same(rows_of([*pieces, stream.flush()], 2), rows_of([whole], 2))
    assert stream.push(x[:, :1]).layout.total == 0  # it began anew


RUNS = [
    {"method": "temporal_merge", "threshold": 0.9},
    {"method": "temporal_merge", "threshold": 0.9, "reduce": "first", "refresh": 5},
    {"method": "temporal_merge", "threshold": 0.9, "reference": "last_kept"},
    {"method": "temporal_merge", "threshold": 0.9, "reference": "run_mean"},
    {"method": "dtd", "threshold": 0.9},
]


def lasting(videos=2, frames=12, dtype=torch.float32):
    """Tokens that change now and then, and a little all the time."""
    jumps = (torch.rand(videos, frames, 6, 1) < 0.3).cumsum(1)
    base = torch.randn(videos, frames + 1, 6, 9).gather(1, jumps.expand(-1, -1, -1, 9))
    return (base + 0.05 * torch.randn(videos, frames, 6, 9)).to(dtype)


def sorted_runs(pieces, videos):
    """(position, weight, value) of each video's runs, over all pieces."""
    found = [[] for _ in range(videos)]
    for piece in pieces:
        bounds = piece.cu_seqlens.tolist()
        for v in range(videos):
            for k in range(bounds[v], bounds[v + 1]):
                found[v].append((*piece.positions[k].tolist(), piece.weight[k].item(), piece.values[k].tolist()))
    return [sorted(rows) for rows in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", RUNS, ids=lambda s: " ".join(map(str, s.values())))
def test_runs_split_anywhere(settings, dtype):
    x = lasting(dtype=dtype)
    whole = compress(x, **settings)
    want = sorted_runs([whole], 2)
    assert 12 < sum(map(len, want)) < 144
    for cuts in [c for n in (1, 2) for c in combinations(range(13), n)] + [tuple(range(1, 12)), (5, 5, 5)]:
        stream = Stream(**settings)
        pieces = [*map(stream.push, chunks(x, cuts)), stream.flush()]
        assert sorted_runs(pieces, 2) == want, cuts


def test_runs_say_what_joined_them():
    x = lasting()
    stream = Stream("temporal_merge", threshold=0.9)
    stream.push(x[:, :5])
    packed = stream.push(x[:, 5:]).trim()
    rows = x[:, 5:].flatten(0, 2)
    inside = packed.assignment.view(2, 8, 6)[:, 1:].flatten()
    began = packed.positions[:, 0] >= 5
    assert began.any() and (~began).any()
    for k in torch.nonzero(began).flatten().tolist():
        members = rows[inside == k]
        assert members.shape[0] == packed.weight[k]
        assert torch.allclose(packed.values[k], members.mean(0), atol=1e-6)


def test_a_row_of_runs_can_begin_anew_and_be_kept(tmp_path):
    x = lasting()
    stream = Stream("temporal_merge", threshold=0.9)
    first = stream.push(x[:, :5])
    other = Stream("temporal_merge", threshold=0.9)
    other.load_state_dict(stream.state_dict())
    rest = [stream.push(x[:, 5:]), stream.flush()]
    assert sorted_runs([first, *rest], 2) == sorted_runs([compress(x, method="temporal_merge", threshold=0.9)], 2)
    other.reset([1])
    anew = sorted_runs([other.push(x[:, 5:]), other.flush()], 2)
    assert anew[0] == sorted_runs(rest, 2)[0]
    assert anew[1] == sorted_runs([compress(x[1:, 5:], method="temporal_merge", threshold=0.9)], 1)[0]
    with pytest.raises(ValueError, match="expected what state_dict"):
        Stream(patch=4, threshold=1.0).load_state_dict(other.state_dict() | {"rows": torch.zeros(1)})


@pytest.mark.parametrize("cut", range(13))
def test_windows_have_their_own_budget(cut):
    tokens = torch.randn(2, 12, 5, 7)
    want = [compress(part, budget=6, method="evs") for part in tokens.split(5, 1)]
    stream = Stream("evs", window=5, budget=6)
    pieces = [*map(stream.push, chunks(tokens, (cut,))), stream.flush()]
    for piece in want[1:]:
        piece._positions = piece.positions + torch.tensor([5 * want.index(piece), 0, 0])
    assert same(rows_of(pieces, 2), rows_of(want, 2))


def test_windows_of_patches():
    x = moving()
    stream = Stream("grt", window=4, budget="50%", patch=4)
    packed = stream.push(x)
    assert packed.cu_seqlens.tolist() == [12 * i for i in range(7)]
    assert packed.positions[:, 0].view(6, 12).amin(1).tolist() == [0, 4, 8] * 2


@pytest.mark.parametrize("settings", [{}, {"search": 1, "reference": "previous", "refresh": 3}])
def test_a_row_can_begin_anew(settings):
    x = moving()
    settings = {"patch": 4, "threshold": 20.0, **settings}
    stream = Stream(**settings)
    stream.push(x[:, :5])
    stream.reset([1])
    after = rows_of([stream.push(x[:, 5:])], 2)
    whole = rows_of([gate_patches(x, **settings)], 2)
    alone = rows_of([gate_patches(x[1:, 5:], **settings)], 1)
    assert same([after[0]], [[r for r in whole[0] if r[0] >= 5]])
    assert same([after[1]], alone)


def test_the_state_can_be_kept(tmp_path):
    from safetensors.torch import load_file, save_file

    x = moving()
    stream = Stream(patch=4, threshold=20.0, tubelet=2)
    first = stream.push(x[:, :5])
    save_file(stream.state_dict(), tmp_path / "state.safetensors")
    other = Stream(patch=4, threshold=20.0, tubelet=2)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert same(rows_of([other.push(x[:, 5:])], 2), rows_of([stream.push(x[:, 5:])], 2))
    assert first.layout.total == 2 * 2 * 6
    with pytest.raises(ValueError, match="expected what state_dict"):
        other.load_state_dict({"step": torch.zeros(2)})


@pytest.mark.parametrize("settings", [{}, {"search": 1, "reference": "previous"}], ids=str)
def test_the_state_of_frames_in_any_memory_order_can_be_kept(settings):
    """Decoders give [B, T, H, W, C]; safetensors take dense tensors alone."""
    from safetensors.torch import load, save

    x = moving().movedim(2, -1).contiguous().movedim(-1, 2)
    stream, other = (Stream(patch=4, threshold=20.0, tubelet=2, **settings) for _ in range(2))
    stream.push(x[:, :5])
    other.load_state_dict(load(save(stream.state_dict())))
    assert same(rows_of([other.push(x[:, 5:])], 2), rows_of([stream.push(x[:, 5:])], 2))


@pytest.mark.parametrize("settings", [{"tubelet": 2}, {"search": 1, "reference": "previous"}], ids=str)
def test_a_stream_lets_go_of_what_had_a_gradient(settings):
    """What went by is freed, though each chunk follows on the state of the one before."""
    stream, seen = Stream(patch=4, threshold=0.1, **settings), []
    for _ in range(4):
        chunk = torch.rand(1, 3, 2, 8, 8, requires_grad=True)
        seen.append(weakref.ref(chunk))
        packed = stream.push(chunk)
        assert packed.values.requires_grad
    del chunk, packed
    gc.collect()
    assert [ref() is None for ref in seen[:-1]] == [True] * 3
    assert not any(tensor.requires_grad for name, tensor in stream.state_dict().items() if name != "pending")


def test_what_waits_has_its_gradient():
    frames = torch.rand(1, 5, 2, 8, 8, requires_grad=True)
    stream = Stream(patch=4, threshold=0.0, tubelet=2)
    pieces = [stream.push(part) for part in chunks(frames, (1, 4))]
    sum(piece.values.sum() for piece in pieces).backward()
    assert (frames.grad[:, :4] != 0).all() and not frames.grad[:, 4:].any()


@pytest.mark.parametrize(
    "settings, wrong",
    [
        ({"patch": 4, "threshold": 20.0}, lambda x: x[..., :7]),
        ({"patch": 4, "threshold": 20.0}, lambda x: x.int()),
        ({"patch": 4, "threshold": 20.0}, lambda x: x[0]),
        ({"patch": 4, "window": 2, "budget": 3}, lambda x: x[..., :7]),
    ],
)
def test_a_chunk_that_is_refused_leaves_no_trace(settings, wrong):
    x, stream, plain = moving(), Stream(**settings), Stream(**settings)
    with pytest.raises((ValueError, RuntimeError)):
        stream.push(wrong(x[:, :4]))
    assert stream.state_dict() == {}
    assert same(rows_of([stream.push(x[:, :4])], 2), rows_of([plain.push(x[:, :4])], 2))


def test_an_error_in_the_middle_leaves_the_stream_as_it_was(monkeypatch):
    x, stream = moving(), Stream(patch=4, threshold=20.0, tubelet=2)
    first = stream.push(x[:, :5])
    before = stream.state_dict()
    with monkeypatch.context() as broken:
        broken.setattr("vtok.gate.PatchGate.write", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            stream.push(x[:, 5:])
    assert before.keys() == stream.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stream.state_dict().items())
    whole = gate_patches(x, patch=4, threshold=20.0, tubelet=2)
    assert same(rows_of([first, stream.push(x[:, 5:])], 2), rows_of([whole], 2))


def test_rows_to_reset_are_those_of_the_batch():
    stream = Stream(patch=4, threshold=20.0)
    stream.push(moving(videos=3))
    stream.reset([])
    stream.reset((0, 2))
    assert stream.state_dict()["step"].tolist() == [0, 12, 0]
    for wrong in ([3], [-1], [1.5], [True], torch.tensor([True, False, True])):
        with pytest.raises((ValueError, TypeError), match="expected videos"):
            stream.reset(wrong)
    assert stream.state_dict()["step"].tolist() == [0, 12, 0]


def test_memory_does_not_grow():
    stream = Stream(patch=4, threshold=20.0, tubelet=2)
    sizes = set()
    for part in moving(frames=60).split(3, 1):
        stream.push(part)
        sizes.add(sum(t.untyped_storage().nbytes() for t in stream.state_dict().values()))
    assert len(sizes) <= 2  # with and without a frame that waits


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Stream(patch=4), "expected a window, or a threshold and a method"),
        (lambda: Stream("evs", threshold=0.5), "expected a window, or a threshold and a method"),
        (lambda: Stream(patch=4, tubelet=2, window=3, budget=1), "expected a window of whole steps of 2 frames, got 3"),
        (lambda: Stream(patch=4, threshold=1.0, residual=True), "expected residual=False"),
        (lambda: Stream(patch=4, threshold=1.0, forced=torch.zeros(2, 4, dtype=torch.bool)), "expected no forced"),
        (lambda: Stream("nothing", window=3), "expected one of the methods"),
        (lambda: Stream(patch=4, threshold=1.0).flush(), "expected frames before the flush"),
        (lambda: Stream(patch=4, threshold=1.0).push(torch.zeros(3)), r"expected a chunk \[B, T, ...\], got \(3,\)"),
    ],
)  # fmt: skip
def test_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_chunks_are_alike():
    stream = Stream(patch=4, threshold=1.0)
    stream.push(moving())
    with pytest.raises(ValueError, match="expected chunks like the first"):
        stream.push(moving(videos=3))
    with pytest.raises(ValueError, match="expected chunks like the first"):
        stream.push(moving().float())
