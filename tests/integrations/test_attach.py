"""Conversations and loops over attached models, against masking at full length."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from vtok import Packed, compress
from vtok.integrations.transformers import attach, compress_inputs, detach

from tiny_models import (
    BATCH,
    PAD,
    VIDEO,
    best,
    compressed,
    features,
    generated,
    is_qwen,
    layout_of,
    less,
    prompt,
    steps,
    text,
)


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
