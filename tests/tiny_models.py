"""Tiny random models of the library, prompts for them, and the reference: masking at full length."""

from __future__ import annotations

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

from vtok import compress

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


def less(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


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
