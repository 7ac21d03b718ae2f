"""Tiny random models of the library: what they say about a compressed prompt, against masking at full length."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

import vtok
from vtok import Packed, compress
from vtok.integrations.transformers import attach, compress_inputs, detach

from rooms import ROOT

VIDEO, IMAGE, PAD = 90, 91, 1
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 100, "initializer_range": 0.3, "pad_token_id": PAD}
TEXT |= {"bos_token_id": None, "eos_token_id": None}


def qwen():
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.3}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    ids = {"video_token_id": VIDEO, "image_token_id": IMAGE, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def llava():
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=20, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **TEXT}, video_token_index=VIDEO,
        image_token_index=IMAGE, image_grid_pinpoints=[[20, 20], [20, 40]],
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


@pytest.fixture(scope="module", params=["qwen", "llava"])
def model(request):
    torch.manual_seed(1)
    made = {"qwen": qwen, "llava": llava}[request.param]().eval()
    made.generation_config.pad_token_id = PAD
    made.generation_config.suppress_tokens = [VIDEO, IMAGE]
    return made


def is_qwen(model):
    return hasattr(model.model, "visual")


GRIDS = [(4, 4, 8), (2, 8, 4), (3, 4, 4)]  # of Qwen2.5-VL's videos, before the merge of 2x2
FRAMES = 4


def text(length):
    return torch.randint(2, 90, (length,)).tolist()


def prompt(model, samples, side="left"):
    """What a processor returns for samples made of "v" (a video), "i" (an image) and numbers (that many words)."""
    rows, grids, image_grids = [], [], []
    for sample in samples:
        row = []
        for part in sample:
            if part == "v":
                grids.append(GRIDS[len(grids) % 3])
                t, h, w = grids[-1]
                row += [92] + [VIDEO] * (t * h * w // 4 if is_qwen(model) else FRAMES * 9 + 1) + [93]
            elif part == "i":
                image_grids.append((1, 4, 6))
                row += [92] + [IMAGE] * (6 if is_qwen(model) else 25 + 5 * 6) + [93]
            else:
                row += text(part)
        rows.append(row)
    longest = max(map(len, rows))
    padding = [[0] * (longest - len(row)) for row in rows]
    join = (lambda pad, row: pad + row) if side == "left" else (lambda pad, row: row + pad)
    ids = torch.tensor([join([PAD] * len(p), r) for p, r in zip(padding, rows, strict=True)])
    mask = torch.tensor([join(p, [1] * len(r)) for p, r in zip(padding, rows, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if is_qwen(model):
        inputs["mm_token_type_ids"] = (ids == IMAGE) * 1 + (ids == VIDEO) * 2
        for name, kind, those in (("pixel_values", "image", image_grids), ("pixel_values_videos", "video", grids)):
            if those:
                inputs[name] = torch.randn(sum(t * h * w for t, h, w in those), 3 * 2 * 4 * 4)
                inputs[f"{kind}_grid_thw"] = torch.tensor(those)
        if grids:
            inputs["second_per_grid_ts"] = torch.tensor([1.5, 2.0, 0.7] * len(grids))[: len(grids)]
    else:
        if grids:
            inputs["pixel_values_videos"] = torch.randn(len(grids), FRAMES, 3, 20, 20)
        if image_grids:
            inputs["pixel_values"] = torch.randn(len(image_grids), 2, 3, 20, 20)
            inputs["image_sizes"] = torch.tensor([[20, 20]] * len(image_grids))
            inputs["batch_num_images"] = torch.tensor([1] * len(image_grids))
    return inputs


def layout_of(model, inputs):
    if is_qwen(model):
        return {"grid_thw": inputs["video_grid_thw"], "merge_size": 2}
    return {"grid_thw": [(FRAMES, 3, 3)] * len(inputs["pixel_values_videos"]), "extra_rows": 1}


def features(model, inputs):
    names = ("pixel_values_videos", "video_grid_thw")
    made = model.get_video_features(**{n: inputs[n] for n in names if n in inputs}, return_dict=True).pooler_output
    return torch.cat(list(made))


def compressed(model, inputs, **rule):
    return compress(features(model, inputs).detach(), **layout_of(model, inputs), **rule)


def masked(model, inputs, kept):
    """The untouched prompt with the dropped placeholders masked: the reference that every test trusts."""
    mask = inputs["attention_mask"].clone()
    mask[inputs["input_ids"] == VIDEO] = kept.mask.to(mask.dtype)
    inputs = {"position_ids": text_positions(mask), **inputs, "attention_mask": mask}
    if is_qwen(model) and inputs.pop("offset", None) is None:
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        whole = {n: inputs.get(n) for n in names}
        positions, _ = model.model.get_rope_index(inputs["input_ids"], **whole, attention_mask=mask_of(inputs))
        inputs["position_ids"] = torch.cat([text_positions(mask)[None], positions])
    return inputs


def mask_of(inputs):
    """The mask before anything was dropped: real tokens, placeholders among them."""
    return (inputs["attention_mask"].bool() | (inputs["input_ids"] == VIDEO)).long()


def text_positions(mask):
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)


def steps(model, inputs, kept, new):
    """Greedy tokens and their logits, one whole masked forward pass for each: no cache, no generate."""
    inputs, logits = masked(model, inputs, kept), []
    for _ in range(new):
        mask = inputs["attention_mask"]
        logits.append(model(**inputs).logits[:, -1])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], best(logits[-1])], 1)
        inputs["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = inputs["position_ids"]
        inputs["position_ids"] = torch.cat([positions, positions[..., -1:] + 1], -1)
    return inputs["input_ids"][:, -new:], torch.stack(logits, 1)


def best(logits):
    """The likeliest token that is no placeholder."""
    return logits.index_fill(1, torch.tensor([VIDEO, IMAGE]), -torch.inf).argmax(1, keepdim=True)


BATCH = [[3, "v", 5, "v", 4], ["v", 2], [7, "v", 8]]  # several videos in a sample; left padding
MIXED = [["i", 3, "v", 2], [4, "i", 2], [3, "v", 1, "i", 1]]  # and one without a video
RULES = {
    "share": {"budget": "30%"},
    "rows": {"budget": 5},
    "total": {"total_budget": "25%", "min_per_frame": 1},
    "threshold": {"threshold": 0.9},
    "uniform": {"budget": 0.4, "method": "uniform"},
    "random": {"budget": 0.4, "method": "random", "seed": 3},
    "scores": {"budget": 0.4, "scores": lambda tokens, layout: tokens.norm(dim=1)},
}


def generated(model, inputs, **settings):
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, **settings}
    return model.generate(**inputs, **settings)


def same_tokens(model, ours, theirs, inputs, shrunk):
    """The new tokens are equal; each prompt is the one that went in."""
    assert torch.equal(ours[:, shrunk["input_ids"].shape[1] :], theirs[:, inputs["input_ids"].shape[1] :])


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


def less(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


def test_a_second_turn_from_the_cache(model):
    """The whole sequence, the new tokens alone, and compress_inputs without attach, against masking at full length."""
    inputs, new = prompt(model, BATCH), 3
    kept = compressed(model, inputs, budget=6)
    first, _ = steps(model, inputs, kept, new)
    question = torch.tensor([text(4) for _ in BATCH])
    grown = reference_of_turn(model, inputs, first, question)
    want, _ = steps(model, grown, kept, new)
    last, _ = steps(model, reference_of_turn(model, grown, want, question), kept, new)
    attach(model, budget=6)
    try:
        out = generated(model, inputs, max_new_tokens=new, return_dict_in_generate=True)
        assert torch.equal(out.sequences, torch.cat([inputs["input_ids"], first], 1))
        whole = torch.cat([out.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(torch.cat([first, question], 1))], 1)
        caches = [copy.deepcopy(out.past_key_values) for _ in range(3)]
        again = {"input_ids": whole, "attention_mask": mask, "past_key_values": caches[0]}
        second = generated(model, again, max_new_tokens=new, return_dict_in_generate=True)
        assert torch.equal(second.sequences, torch.cat([whole, want], 1))
        third = {"input_ids": torch.cat([second.sequences, question], 1), "past_key_values": second.past_key_values}
        third["attention_mask"] = torch.cat([mask, torch.ones_like(third["input_ids"][:, mask.shape[1] :])], 1)
        assert torch.equal(generated(model, third, max_new_tokens=new)[:, -new:], last)
        own = DynamicCache(config=model.config.get_text_config())
        types = {"mm_token_type_ids": (whole == VIDEO) * 2} if is_qwen(model) else {}
        first_alone = generated(model, inputs, max_new_tokens=new, past_key_values=own)
        assert torch.equal(
            generated(model, {**again, **types, "past_key_values": own}, max_new_tokens=new)[:, -new:], want
        )
        assert torch.equal(first_alone, out.sequences)
        with pytest.raises(ValueError, match="expected no pixels together with a cache that holds a compressed prompt"):
            generated(model, {**again, "past_key_values": caches[1], "pixel_values_videos": torch.zeros(1)})
    finally:
        detach(model)
    shrunk = compress_inputs(model, inputs, budget=6)
    out = generated(model, shrunk, max_new_tokens=new, return_dict_in_generate=True)
    whole = torch.cat([out.sequences, question], 1)
    mask = torch.cat([shrunk["attention_mask"], torch.ones_like(whole[:, shrunk["attention_mask"].shape[1] :])], 1)
    again = {"input_ids": whole, "attention_mask": mask, "past_key_values": out.past_key_values}
    assert torch.equal(generated(model, again, max_new_tokens=new)[:, -new:], want)
    attach(model, budget=6)
    try:  # new tokens alone: those that the cache lacks
        alone = {"input_ids": whole[:, -5:], "attention_mask": mask, "past_key_values": caches[2]}
        assert torch.equal(generated(model, alone, max_new_tokens=new)[:, -new:], want)
    finally:
        detach(model)


def reference_of_turn(model, inputs, answer, question):
    """The inputs of a conversation that went on: the same video, more text.

    The cache holds all of the answer but its last token, at positions that follow the prompt's last; what is new has
    the number of tokens before it plus the model's own offset. (Both agree unless a video outlasts the text after it.)
    """
    more = torch.cat([answer, question], 1)
    grown = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    grown["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    if is_qwen(model):
        old, offset = inputs.get("position_ids"), inputs.get("offset")
        if old is None:
            names = ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
            old, offset = model.model.get_rope_index(inputs["input_ids"], **{n: inputs[n] for n in names})
        cached = answer.shape[1] - 1
        following = old[..., -1:] + 1 + torch.arange(cached)
        before = grown["attention_mask"].cumsum(1)[:, -more.shape[1] + cached :] - 1
        new = (before + offset).expand(3, -1, -1)
        grown["position_ids"], grown["offset"] = torch.cat([old, following, new], -1), offset
    return grown


def test_a_forward_pass_by_hand(model):
    """Prefill and decode through the attached forward: only the first call is a prompt."""
    inputs = prompt(model, [[3, "v", 5]])
    if is_qwen(model):  # a video that does not outlast the text: then the library decodes as generate does
        inputs["second_per_grid_ts"] = torch.tensor([0.25])
    want, _ = steps(model, inputs, compressed(model, inputs, budget=6), 3)
    attach(model, budget=6)
    try:
        cache, got = DynamicCache(config=model.config.get_text_config()), []
        out = model(**inputs, past_key_values=cache, use_cache=True)
        for _ in range(3):
            got.append(best(out.logits[:, -1]))
            out = model(input_ids=got[-1], past_key_values=cache, use_cache=True)
    finally:
        detach(model)
    assert torch.equal(torch.cat(got, 1), want)


def test_lengths_and_prompts_are_the_callers(model, recwarn):
    inputs = prompt(model, BATCH)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    plain = {"max_new_tokens": None, "do_sample": False}
    attach(model, budget="30%")
    try:
        want = generated(model, inputs, max_new_tokens=6)
        assert torch.equal(want[:, :length], ids) and want.shape[1] == length + 6
        assert torch.equal(generated(model, inputs, **plain, max_length=length + 6), want)
        assert torch.equal(generated(model, inputs, **plain, max_length=length + 6, min_length=length + 3), want)
        config = GenerationConfig(max_length=length + 6, do_sample=False, pad_token_id=PAD)
        for call in (lambda: model.generate(**inputs, generation_config=config), lambda: model.generate(
            ids, config, **less(inputs, "input_ids")
        )):  # fmt: skip
            assert torch.equal(call(), want)
        assert config.max_length == length + 6
        assert generated(model, inputs, **plain).shape[1] == length + 20
        model.generation_config.max_length = length + 6
        assert torch.equal(generated(model, inputs, **plain), want)
    finally:
        model.generation_config.max_length = None
        detach(model)


def test_attach_and_detach(model):
    inputs = prompt(model, BATCH)
    before, want = dict(vars(model)), generated(model, inputs)
    attach(model, budget=4)
    four = generated(model, inputs)
    attach(model, budget=9)  # the new settings take the place of the old
    nine = generated(model, inputs)
    twin = copy.deepcopy(model)
    detach(model)
    detach(model)
    assert vars(model) == before and not model._forward_pre_hooks
    assert torch.equal(generated(model, inputs), want)
    assert torch.equal(generated(twin, inputs), nine) and not torch.equal(four, nine)
    detach(twin)
    assert torch.equal(generated(twin, inputs), want)
    shrunk = compress_inputs(model, inputs, budget=9)
    assert torch.equal(generated(model, shrunk)[:, -4:], nine[:, -4:])
    attach(model, budget=4)
    try:  # what is compressed already passes
        assert torch.equal(generated(model, compress_inputs(model, inputs, budget=9))[:, -4:], nine[:, -4:])
    finally:
        detach(model)
    model.generate = marked = lambda *args, **kwargs: "another's"
    attach(model, budget=4)
    assert model.generate(**inputs | {"pixel_values_videos": None}) == "another's"
    detach(model)
    assert model.generate is marked
    del model.generate


def test_generate_keeps_no_graph(model):
    tower, seen = model.model.multi_modal_projector if not is_qwen(model) else model.model.visual, []
    hook = tower.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    attach(model, budget=4)
    try:
        generated(model, prompt(model, BATCH))
        assert seen == [False]  # one pass of the tower
    finally:
        detach(model)
        hook.remove()


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


def test_saved_videos_answer_a_second_question(model, tmp_path):
    """Two videos compressed in one batch, saved one by one, and asked about anew, alone and together."""
    first = prompt(model, [[3, "v", 5], ["v", 2]])
    shrunk = compress_inputs(model, first, budget="30%")
    for number, video in enumerate(shrunk.packed):
        video.save(tmp_path / f"{number}.safetensors")
    loaded = [Packed.load(tmp_path / f"{number}.safetensors") for number in range(2)]
    question = prompt(model, [[9, "v", 1, "v", 7]])
    for name in ("pixel_values_videos", "video_grid_thw"):
        if name in first:
            question[name] = first[name]
    anew = compress_inputs(model, question, budget="30%")
    for inputs in (question, less(question, "pixel_values_videos")):
        again = compress_inputs(model, inputs, packed=loaded)
        assert torch.equal(model(**again).logits, model(**anew).logits)
        assert torch.equal(generated(model, again), generated(model, anew))
    assert len(again.packed) == 2
    together = compress(features(model, first), **layout_of(model, first), budget="30%")
    assert torch.equal(generated(model, compress_inputs(model, question, packed=[together])), generated(model, anew))


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
