"""What tiny random models say about a compressed prompt, against masking at full length."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers

import vtok
from vtok import compress
from vtok.integrations.transformers import attach, compress_inputs, detach

from rooms import ROOT
from tiny_models import (
    BATCH,
    IMAGE,
    MIXED,
    PAD,
    RULES,
    VIDEO,
    compressed,
    generated,
    is_qwen,
    layout_of,
    less,
    masked,
    prompt,
    qwen,
    same_tokens,
    steps,
)


@pytest.mark.parametrize("samples", [BATCH, MIXED], ids=["batch", "mixed"])
@pytest.mark.parametrize("rule", [{}, {"budget": None, "method": "random"}, {"budget": "100%"}, {"budget": 1.0}])
def test_keeping_all_is_the_untouched_model(model, samples, rule):
    inputs = prompt(model, samples)
    want, logits = generated(model, inputs), model(**inputs).logits
    assert torch.equal(generated(model, compress_inputs(model, inputs, **rule)), want)
    assert torch.allclose(model(**compress_inputs(model, inputs, **rule)).logits, logits, atol=1e-5)
    attach(model, **rule)
    try:
        assert torch.equal(generated(model, inputs), want)
        assert torch.allclose(model(**inputs).logits, logits, atol=1e-5)
    finally:
        detach(model)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_tokens_are_those_of_the_masked_prompt(model, rule):
    inputs = prompt(model, BATCH)
    kept = compressed(model, inputs, **rule).trim()
    want, logits = steps(model, inputs, kept, 4)
    shrunk = compress_inputs(model, inputs, **rule)
    out = generated(model, shrunk, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences[:, -4:], want)
    assert torch.allclose(torch.stack(out.logits, 1), logits, atol=1e-5)
    dropped = kept.layout.total - kept.values.shape[0]
    placeholders = int((shrunk["input_ids"] == VIDEO).sum())
    assert dropped > 0 and placeholders == int((inputs["input_ids"] == VIDEO).sum()) - dropped
    assert shrunk["input_ids"].shape[1] == int(masked(model, inputs, kept)["attention_mask"].sum(1).max())
    assert not torch.allclose(logits, steps(model, inputs, compressed(model, inputs, budget="100%"), 4)[1], atol=1e-2)


def test_budgets_of_each_video_and_frame(model):
    inputs = prompt(model, BATCH)
    frames = [grid[0] for grid in layout_of(model, inputs)["grid_thw"]]
    sizes = compressed(model, inputs, budget="100%").layout.grids
    for budget in ([3, 0, "50%", 7], [[i % 3 for i in range(t)] for t in map(int, frames)]):
        want, _ = steps(model, inputs, compressed(model, inputs, budget=budget), 3)
        shrunk = compress_inputs(model, inputs, budget=budget)
        assert torch.equal(generated(model, shrunk, max_new_tokens=3)[:, -3:], want)
        assert [p.layout.grids for p in shrunk.packed] == [[grid] for grid in sizes]


def test_images_stay_and_samples_need_no_video(model):
    inputs = prompt(model, MIXED)
    want, _ = steps(model, inputs, compressed(model, inputs, budget=6), 4)
    shrunk = compress_inputs(model, inputs, budget=6)
    assert torch.equal(generated(model, shrunk)[:, -4:], want)
    assert int((shrunk["input_ids"] == IMAGE).sum()) == int((inputs["input_ids"] == IMAGE).sum())
    assert not set(shrunk) & {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes"}
    without = prompt(model, [[4, "i", 2], [3]])
    assert compress_inputs(model, without, budget=6) == without


def test_no_row_at_all(model):
    inputs = prompt(model, BATCH)
    want, _ = steps(model, inputs, compressed(model, inputs, budget=[0] * 4), 3)
    shrunk = compress_inputs(model, inputs, budget=[0] * 4)
    assert torch.equal(generated(model, shrunk, max_new_tokens=3)[:, -3:], want)
    assert int((shrunk["input_ids"] == VIDEO).sum()) == (0 if is_qwen(model) else 4)


def test_masks_are_the_callers(model):
    """Without a mask all tokens count; a placeholder that the caller masks still takes its row."""
    inputs = prompt(model, [[3, "v", 5]])
    shrunk = compress_inputs(model, inputs, budget=6)
    bare = compress_inputs(model, less(inputs, "attention_mask"), budget=6)
    assert bare.keys() == shrunk.keys() and torch.equal(bare["attention_mask"], shrunk["attention_mask"])
    assert torch.equal(model(**bare).logits, model(**shrunk).logits)
    if is_qwen(model):
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    column = int((inputs["input_ids"] == VIDEO).nonzero()[0, 1])
    inputs["attention_mask"] = inputs["attention_mask"].index_fill(1, torch.tensor([column]), 0)
    shrunk = compress_inputs(model, inputs, budget="100%")
    assert torch.equal(shrunk["attention_mask"], inputs["attention_mask"])
    assert torch.equal(model(**shrunk).logits, model(**inputs).logits)


def test_positions_are_gathered(model):
    if not is_qwen(model):
        inputs = prompt(model, BATCH)
        assert "position_ids" not in compress_inputs(model, inputs, budget=5)
        with pytest.raises(ValueError, match="LlavaOnevisionForConditionalGeneration without position_ids, got them"):
            compress_inputs(model, {**inputs, "position_ids": inputs["input_ids"]}, budget=5)
        return
    inputs = prompt(model, BATCH)
    names = ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    whole, deltas = model.model.get_rope_index(inputs["input_ids"], **{n: inputs[n] for n in names})
    kept = compressed(model, inputs, budget=5)
    mask = masked(model, inputs, kept)["attention_mask"].bool()
    for given in ({}, {"position_ids": whole}, {"position_ids": torch.cat([whole[:1], whole])}):
        shrunk = compress_inputs(model, {**inputs, **given}, budget=5)
        for sample in range(3):
            real = shrunk["attention_mask"][sample].bool()
            assert torch.equal(shrunk["position_ids"][1:, sample, real], whole[:, sample, mask[sample]])
            assert shrunk["position_ids"][0, sample, real].tolist() == list(range(int(real.sum())))
    lost = inputs["attention_mask"].sum(1) - mask.sum(1)
    assert torch.equal(model.model.rope_deltas[:, 0], deltas[:, 0] + lost)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 3},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
    ],
    ids=["beams", "returned beams", "sampling", "static cache", "chunked prefill"],
)
def test_ways_to_generate(model, settings, even):
    inputs, rule = prompt(model, BATCH), {"budget": 4 if even else "30%", "method": "random"}
    if not even and not is_qwen(model):
        rule["budget"] = [5, 2, 7, 3]
    kept = compressed(model, inputs, **rule)
    reference = masked(model, inputs, kept)
    settings = {"max_new_tokens": 5, **settings}
    torch.manual_seed(0)
    want = generated(model, reference, **settings)
    if not settings.keys() & {"num_beams", "do_sample"}:
        assert torch.equal(want[:, -5:], steps(model, inputs, kept, 5)[0])
    shrunk = compress_inputs(model, inputs, **rule)
    torch.manual_seed(0)
    same_tokens(model, generated(model, shrunk, **settings), want, inputs, shrunk)
    attach(model, **rule)
    try:
        torch.manual_seed(0)
        out = generated(model, inputs, **settings, return_dict_in_generate=True)
    finally:
        detach(model)
    assert torch.equal(out.sequences, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_and_gradients(model, side):
    inputs = prompt(model, BATCH, side)
    kept = compressed(model, inputs, budget=6)
    ids = inputs["input_ids"]
    labels = ids.masked_fill((inputs["attention_mask"].cumsum(1) <= 1) | (ids == VIDEO) | (ids == PAD), -100)
    reference = masked(model, inputs, kept)
    logits, mask = model(**reference).logits, reference["attention_mask"].bool()
    pairs = [(logits[i, mask[i]][:-1], labels[i, mask[i]][1:]) for i in range(3)]
    want = torch.nn.functional.cross_entropy(*map(torch.cat, zip(*pairs, strict=True)))
    tower = [p for name, p in model.named_parameters() if "vis" in name]
    gradients = torch.autograd.grad(want, tower, allow_unused=True)
    shrunk = compress_inputs(model, {**inputs, "labels": labels}, budget=6)
    loss = model(**shrunk).loss
    assert torch.allclose(loss, want, atol=1e-5)
    assert (shrunk["attention_mask"][:, -1] == 0).any() == (side == "right")
    got = torch.autograd.grad(loss, tower, allow_unused=True)
    compared = [(a, b) for a, b in zip(got, gradients, strict=True) if b is not None]
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in compared)
    assert sum(float(b.abs().max()) > 1e-4 for _, b in compared) > 10
    attach(model, budget=6)
    try:
        assert torch.equal(model(**inputs, labels=labels).loss, loss)
        assert torch.equal(model(inputs["input_ids"], labels=labels, **less(inputs, "input_ids")).loss, loss)
    finally:
        detach(model)


def test_inputs_are_not_changed(model):
    inputs = prompt(model, MIXED)
    inputs["labels"] = inputs["input_ids"].clone()
    before = {name: (id(value), value.clone()) for name, value in inputs.items()}
    shrunk = compress_inputs(model, transformers.BatchFeature(inputs), budget=4)
    model(**shrunk)
    attach(model, budget=4)
    try:
        model(**inputs)
        generated(model, less(inputs, "labels"), num_beams=2)
    finally:
        detach(model)
    assert before.keys() == inputs.keys()
    assert all(id(inputs[n]) == i and torch.equal(inputs[n], value) for n, (i, value) in before.items())


def test_packed_of_other_videos(model):
    inputs = prompt(model, [[3, "v", 5, "v"]])
    videos = compress_inputs(model, inputs, budget=4).packed
    with pytest.raises(ValueError, match=r"expected packed of videos with the grids \[.*\], got \[\(.*\)\]"):
        compress_inputs(model, inputs, packed=videos[:1])
    with pytest.raises(ValueError, match="expected one of packed and a budget, got both"):
        compress_inputs(model, inputs, packed=videos, budget=4)
    with pytest.raises(ValueError, match="expected packed of videos with the grids"):
        compress_inputs(model, inputs, packed=[])
    other = compress(torch.randn(20, 32), [(2, 3, 3)], budget=4, extra_rows=2)
    with pytest.raises(ValueError, match=r"expected packed with extra_rows=\d, got 2"):
        compress_inputs(model, inputs, packed=[other])
    if not is_qwen(model):
        with pytest.raises(ValueError, match="expected 37 video placeholders in input_ids, got 74"):
            compress_inputs(model, less(inputs, "pixel_values_videos"), packed=videos[:1])


def test_errors(model, monkeypatch):
    inputs = prompt(model, [[3, "v", 5]])
    with pytest.raises(TypeError, match=r"class Qwen2_5_VLForConditionalGeneration or Llava.*, got Linear"):
        compress_inputs(torch.nn.Linear(2, 2), inputs, budget=4)
    with pytest.raises(TypeError, match=r"expected a model of class .*, got (Qwen2_5_VL|LlavaOnevision)Model$"):
        attach(model.model, budget=4)
    with pytest.raises(ValueError, match="expected input_ids in the inputs, got none"):
        compress_inputs(model, less(inputs, "input_ids"), budget=4)
    with pytest.raises(ValueError, match=r"expected attention_mask of shape \(1, .*\), got \(1, 1, 2, 2\)"):
        compress_inputs(model, {**inputs, "attention_mask": torch.ones(1, 1, 2, 2)}, budget=4)
    more = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 92, VIDEO)}
    with pytest.raises(ValueError, match=r"expected \d+ video placeholders in input_ids, got \d+"):
        compress_inputs(model, more, budget=4)
    with pytest.raises(ValueError, match="expected one of the methods"):
        compress_inputs(model, inputs, budget=4, method="none")
    if is_qwen(model):
        for name in ("mm_token_type_ids", "video_grid_thw"):
            with pytest.raises(ValueError, match=f"expected {name} in the inputs, got none"):
                compress_inputs(model, less(inputs, name), budget=4)
        with pytest.raises(ValueError, match=r"expected position_ids of shape \(3 or 4, B, L\), got"):
            compress_inputs(model, {**inputs, "position_ids": inputs["input_ids"]}, budget=4)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")  # a lazy module of its own
    for call in (compress_inputs, attach):
        with pytest.raises(
            ImportError, match=r"^vtok.integrations.transformers needs transformers 5.18 or newer, got 4.57.1$"
        ):
            call(model, *([inputs] if call is compress_inputs else []), budget=4)


class Processor:
    def __init__(self, inputs):
        self.inputs, self.decoded = transformers.BatchFeature(inputs), None

    def apply_chat_template(self, messages, **settings):
        kinds = [part["type"] for message in messages for part in message["content"]]
        assert kinds == ["video", "text"] and settings["return_dict"] and settings["return_tensors"] == "pt"
        return self.inputs

    def batch_decode(self, ids, **settings):
        self.decoded = ids
        return [str(ids.tolist())]


def test_the_lines_of_the_readme(monkeypatch, tmp_path):
    """They run as they stand, but for a tiny model and a processor that reads no file."""
    blocks = [b for b in (ROOT / "README.md").read_text().split("```python\n") if "vtok.integrations.transformers" in b]
    torch.manual_seed(2)
    model = qwen().eval()
    model.generation_config.suppress_tokens = [VIDEO, IMAGE]
    inputs = prompt(model, [[5, "v", 4]])
    processor = Processor(inputs)
    library = sys.modules["transformers"]
    monkeypatch.setattr(library.Qwen2_5_VLForConditionalGeneration, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(library.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    monkeypatch.chdir(tmp_path)
    space = {"torch": torch, "vtok": vtok, "second_question": inputs}
    for block in blocks:
        exec(block.split("```")[0], space)
    assert len(blocks) == 2 and processor.decoded.shape == (1, 64)
    detach(model)
    want, _ = steps(model, inputs, compressed(model, inputs, budget="25%"), 3)
    assert torch.equal(processor.decoded[:, :3], want)
    assert torch.equal(generated(model, space["again"]), generated(model, space["shrunk"]))


def test_uneven_samples_before_5_19(model, monkeypatch):
    """There beams repeated every piece for itself: right for a list with one piece per sample, not for a tensor."""
    inputs = prompt(model, BATCH)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.18.1")
    if is_qwen(model):
        assert [len(p) for p in features_in(compress_inputs(model, inputs, budget=[1, 2, 3, 4]))] == [3, 3, 4]
        return
    assert features_in(compress_inputs(model, inputs, budget=[2, 1, 4, 4])).shape == (3, 5, 32)
    with pytest.raises(
        ValueError, match=r"^expected as many rows in each sample before transformers 5.19, got \[5, 4, 5]$"
    ):
        compress_inputs(model, inputs, budget=[1, 2, 3, 4])


def features_in(shrunk):
    return shrunk["mm_encoder_outputs"]["video"].pooler_output


def test_vtok_alone_imports_nothing_heavy():
    heavy = ("transformers", "safetensors", "torch._dynamo")
    code = f"import sys, json, vtok; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
