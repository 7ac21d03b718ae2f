"""Towers of tiny random models on disk as token sources: the library's own tokens, and one sentence for bad models."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vtok import encoder, trial

from clips import moving_square, one_sentence, process, save, vtok_run

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {"image_size": 64, "patch_size": 16}
TEXT = {
    **VISION,
    "vocab_size": 60,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 24,
    "fullatt_block_indexes": [1],
    "window_size": 56,
    "patch_size": 8,
}
QWEN_TEXT = {
    **TEXT,
    "hidden_size": 24,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
}
KINDS = ["siglip", "siglip tower", "clip", "clip tower", "clip projection", "qwen", "qwen tower"]


def tiny(kind):
    """A random model of the library."""
    family, _, part = kind.partition(" ")
    if family == "qwen":
        config = transformers.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_VISION)
        if part:
            return qwen.Qwen2_5_VisionTransformerPretrainedModel(config.vision_config).eval()
        return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    prefix, vision = {"siglip": "Siglip", "clip": "CLIP"}[family], VISION | PICTURE
    if part:
        model = f"{prefix}VisionModel" + ("WithProjection" if part == "projection" else "")
        return getattr(transformers, model)(getattr(transformers, f"{prefix}VisionConfig")(**vision)).eval()
    config = getattr(transformers, f"{prefix}Config")(text_config=TEXT, vision_config=vision)
    return getattr(transformers, f"{prefix}Model")(config).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (the model in memory, its folder)."""
    made = {}
    for kind in KINDS:
        torch.manual_seed(len(made))
        model = tiny(kind)
        folder = tmp_path_factory.mktemp("model") / kind.replace(" ", "-")
        model.save_pretrained(folder)
        made[kind] = model, folder
    return made


@pytest.fixture
def copy(models, tmp_path):
    """The folder of a kind, to be spoilt."""

    def copied(kind="clip"):
        return Path(shutil.copytree(models[kind][1], tmp_path / "model"))

    return copied


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(*arguments):
        raise AssertionError(f"a test reached for the network: {arguments}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def frames(count, height=64, width=64):
    return torch.from_numpy(np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def library_tokens(model, kind, clip):
    """Rows (T, N, D) of the frames by the library's own processor and model; Qwen takes each frame as a still."""
    pictures = list(clip.numpy())
    if kind.startswith("qwen"):
        processor = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=1, max_pixels=10**6)
        inputs = processor(pictures, return_tensors="pt")
        visual = model if kind == "qwen tower" else model.model.visual
        rows = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        return rows.view(len(clip), -1, rows.shape[-1])
    processor = (SiglipImageProcessorPil if "siglip" in kind else CLIPImageProcessorPil)(
        do_resize=False, do_center_crop=False
    )
    tower = getattr(model, "vision_model", model)
    rows = tower(**processor(pictures, return_tensors="pt")).last_hidden_state
    return rows if "siglip" in kind else rows[:, 1:]


# Tokens


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_librarys(models, kind):
    model, folder = models[kind]
    tower = encoder.load(str(folder))
    assert (tower.patch, tower.tubelet, tower.size) == ((16, 2, None) if "qwen" in kind else (16, 1, 64))
    assert not any(module.training for module in tower.tower.modules())
    clip = frames(3)
    with torch.no_grad():
        want = library_tokens(model, kind, clip)
    got = tower(clip.repeat_interleave(tower.tubelet, 0))
    assert got.shape == (1, 3, 4, 4, want.shape[-1]) and not got.is_inference()
    torch.testing.assert_close(got.view_as(want), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "clip", "qwen"])
def test_other_shapes_and_batches(models, monkeypatch, kind):
    tower = encoder.load(str(models[kind][1]))
    clip = frames(6, 32, 80)
    whole = tower(clip)
    assert whole.shape[:4] == (1, 6 // tower.tubelet, 2, 5)
    heard = []
    monkeypatch.setattr(encoder, "BATCH_PIXELS", 5000)  # one frame, or one tubelet, at a time
    parts = tower(clip, lambda done, total: heard.append((done, total)))
    assert heard == [(done, 6) for done in range(tower.tubelet, 7, tower.tubelet)]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(encoder.EncoderError, match=r"tokens of . frames of 16x16 pixels tile, got 6 of 81x32"):
        tower(frames(6, 32, 81))


@pytest.mark.parametrize("nested", [False, True])
def test_colours_are_the_models_own(copy, nested):
    folder = copy("siglip")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}
    name, content = (
        ("processor_config.json", {"image_processor": said}) if nested else ("preprocessor_config.json", said)
    )
    (folder / name).write_text(json.dumps(content))
    tower = encoder.load(str(folder))
    clip = frames(1, 16, 16)
    want = (clip / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([1.0, 2, 4])
    torch.testing.assert_close(tower._normalised(clip), want.permute(0, 3, 1, 2))


def test_only_the_files_of_the_tower_are_needed(models, tmp_path):
    model, _ = models["qwen"]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    others = set(files.values()) - {file for key, file in files.items() if key.startswith("visual.")}
    assert others
    for file in others:
        (tmp_path / file).unlink()
    tower = encoder.load(str(tmp_path))
    with torch.no_grad():
        want = library_tokens(model, "qwen", frames(1))
    torch.testing.assert_close(tower(frames(1).repeat_interleave(2, 0)).view_as(want), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_weights_by_older_names(copy, prefix):
    folder = copy("qwen")
    weights = load_file(folder / "model.safetensors")
    want = encoder.load(str(folder))(frames(2))
    renamed = {key.replace("visual.", prefix, 1): value for key, value in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    assert torch.equal(encoder.load(str(folder))(frames(2)), want)


def test_a_hub_id_from_the_cache(models, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--vtok--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(models["clip"][1], snapshot)
    (tmp_path / "models--vtok--tiny" / "refs").mkdir()
    (tmp_path / "models--vtok--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    want = encoder.load(str(models["clip"][1]))(frames(1))
    assert torch.equal(encoder.load("vtok/tiny")(frames(1)), want)


# The command


@pytest.mark.parametrize(
    "kind, spans", [("siglip", "16x16 pixels"), ("clip tower", "16x16 pixels"), ("qwen", "2 frames")]
)
def test_compress(models, tmp_path, capfd, kind, spans):
    clip = save(tmp_path / "a.mkv", moving_square(9, 64, 96))
    options = ("--encoder", models[kind][1], "--fps", 1000, "--save-tokens", "--out", tmp_path / "out")
    code, said, complaint = vtok_run(capfd, "compress", clip, *options)
    assert (code, complaint) == (0, "")
    columns, rows, moments = (6, 4, 5) if kind == "qwen" else (4, 2, 9)  # CLIP and SigLIP at their own size
    total = columns * rows * moments
    channels = 24 if kind == "qwen" else 32
    for fact in (
        spans,
        f"{total} of {channels} numbers",
        "9 of 9",
        "encode",
        "pixels where its tokens were kept",
        "uniform frames",
    ):
        assert fact in said
    assert "patchify" not in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["preview.mp4", "sheet.png", "tokens.safetensors"]
    with safe_open(str(tmp_path / "out" / "tokens.safetensors"), "pt") as file:
        assert file.get_tensor("values").shape == (total // 4, channels)


def test_the_picture_shows_the_pixels_of_the_kept_tokens():
    clip = torch.from_numpy(moving_square(5, 32, 48))
    tokens = torch.ones(1, 3, 2, 3, 4)
    tokens[0, 1, 1, 2] = -1  # all that ever changes; two frames to a token
    result = trial.run(clip, 16, {"budget": 7}, "evs", torch.device("cpu"), tokens=tokens, tubelet=2)
    assert result.packed.index.tolist() == [0, 1, 2, 3, 4, 5, 11]
    want = clip[[0, 1, 0, 1, 0]].clone()
    want[2:4, 16:, 32:] = clip[2:4, 16:, 32:]
    want[4, 16:, 32:] = clip[2, 16:, 32:]
    assert torch.equal(result.rebuilt, want)
    assert [step.name for step in result.steps] == ["score, select, pack"]


def test_patches_of_several_frames_are_undone():
    clip = torch.from_numpy(moving_square(5, 32, 48))
    tokens = trial.patchify(clip, 16, 2)
    assert tokens.shape == (1, 3, 2, 3, 2 * 768)
    result = trial.run(clip, 16, {"budget": 18}, "evs", torch.device("cpu"), tokens=tokens, tubelet=2)
    assert torch.equal(result.rebuilt, clip) and result.psnr["evs"] == float("inf")


# Bad models


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    part = config["vision_config"] if changes.pop("vision", False) else config
    part.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    bomb = Bomb()
    bomb.marker = str(folder / "ran")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(bomb))


def without(*prefixes):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in weights.items() if not k.startswith(prefixes)}, folder / "model.safetensors")

    return spoil


def shards(**weight_map):
    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def cut(share):
    def spoil(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: int(len(data) * share)])

    return spoil


def other_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.post_layernorm.weight"] = torch.zeros(5)
    save_file(weights, folder / "model.safetensors")


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


BAD_MODELS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json in the folder"),
    "config is no JSON": (write("config.json", "{"), "JSONDecodeError"),
    "config is a list": (write("config.json", "[]"), "an object in config.json"),
    "no type": (write("config.json", "{}"), "None"),
    "text alone": (lambda f: edit(f, model_type="bert"), "'bert'"),
    "text tower": (lambda f: edit(f, model_type="clip_text_model"), "'clip_text_model'"),
    "another family": (lambda f: edit(f, model_type="siglip2"), "SigLIP, CLIP, Qwen2.5-VL"),
    "an unknown type": (lambda f: edit(f, model_type="new", auto_map={"AutoConfig": "code.C"}), "'new'"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "expected weights in safetensors"),
    "a pickle": (only_a_pickle, "a pickle (.bin) is never opened"),
    "weights of the text alone": (without("vision_model."), "got none for 'embeddings."),
    "a weight missing": (without("vision_model.post_layernorm.bias"), "'post_layernorm.bias'"),
    "another shape": (other_shape, "'post_layernorm.weight' of shape (32,)"),
    "cut in the middle": (cut(0.5), "got"),
    "cut in the header": (cut(0.001), "got"),
    "empty": (cut(0), "got"),
    "noise": (write("model.safetensors", "\xff" * 1000), "got"),
    "shards elsewhere": (shards(a="../other.safetensors"), "expected weights in safetensors"),
    "shards in a pickle": (shards(a="pytorch_model.bin"), "expected weights in safetensors"),
    "shards that are no list": (write("model.safetensors.index.json", "[]"), "an object in model"),
    "no layers": (lambda f: edit(f, vision=True, num_hidden_layers=0), "num_hidden_layers"),
    "too many layers": (lambda f: edit(f, vision=True, num_hidden_layers=10**9), "num_hidden_layers"),
    "too wide": (lambda f: edit(f, vision=True, hidden_size=2**40, intermediate_size=2**40), "got"),
    "no patch": (lambda f: edit(f, vision=True, patch_size=0), "patch_size"),
    "another patch": (lambda f: edit(f, vision=True, patch_size=8), "of shape"),
    "patches of text": (lambda f: edit(f, vision=True, patch_size="16"), "patch_size"),
    "one channel": (lambda f: edit(f, vision=True, num_channels=1), "of shape"),
    "heads that do not divide": (lambda f: edit(f, vision=True, num_attention_heads=5), "number of attention heads"),
    "an unknown function": (lambda f: edit(f, vision=True, hidden_act="os.system"), "KeyError: 'os.system'"),
    "colours of two channels": (write("preprocessor_config.json", '{"image_mean": [0, 0]}'), "3 channels of"),
    "colours that divide by 0": (write("preprocessor_config.json", '{"image_std": [0, 1, 1]}'), "3 channels of"),
    "colours of text": (write("preprocessor_config.json", '{"image_std": ["a", "b", "c"]}'), "got"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models_are_one_sentence(copy, tmp_path, capfd, kind):
    spoil, words = BAD_MODELS[kind]
    folder = copy()
    if kind == "shards that are no list":
        (folder / "model.safetensors").unlink()
    spoil(folder)
    clip = save(tmp_path / "a.mkv", moving_square(2, 64, 64))
    code, said, complaint = vtok_run(capfd, "compress", clip, "--encoder", folder, "--out", tmp_path / "out")
    assert code == 2 and said == "" and one_sentence(complaint) and words in complaint
    assert not (tmp_path / "out").exists() and not (folder / "ran").exists()


@pytest.mark.parametrize(
    "changes", [{"fullatt_block_indexes": "no"}, {"window_size": 0}, {"spatial_merge_size": 3}, {"num_heads": 5}]
)
def test_a_config_that_fails_late_is_one_sentence(copy, tmp_path, capfd, changes):
    folder = copy("qwen")
    edit(folder, vision=True, **changes)
    clip = save(tmp_path / "a.mkv", moving_square(2, 64, 64))
    code, said, complaint = vtok_run(capfd, "compress", clip, "--encoder", folder, "--out", tmp_path / "out")
    assert code == 2 and said == "" and one_sentence(complaint)


@pytest.mark.parametrize(
    "name, words",
    [
        ("no/such/folder", "does not exist"),
        ("./model", "does not exist"),
        ("../up", "does not exist"),
        ("", "does not exist"),
        ("https://example.invalid/a", "does not exist"),
        (__file__, "a file"),
        ("vtok-tests/nothing", "hub"),
        ("nothing", "hub"),
    ],
)
def test_names_of_no_model(tmp_path, capfd, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    code, said, complaint = vtok_run(capfd, "compress", save(tmp_path / "a.mkv", moving_square(2)), "--encoder", name)
    assert code == 2 and said == "" and one_sentence(complaint) and words in complaint
    assert [p.name for p in tmp_path.iterdir()] == ["a.mkv"]


def test_a_hub_out_of_reach(tmp_path, capfd, monkeypatch):
    def refused(*arguments, **options):
        raise OSError(111, "Connection refused")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    clip = save(tmp_path / "a.mkv", moving_square(2))
    code, said, complaint = vtok_run(
        capfd, "compress", clip, "--encoder", "vtok-tests/nothing", "--out", tmp_path / "out"
    )
    assert code == 2 and said == "" and one_sentence(complaint) and "hub" in complaint


def test_code_of_the_model_never_runs(copy, monkeypatch):
    folder = copy("clip")
    auto = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    edit(folder, auto_map=auto, _attn_implementation="someone/kernel", attn_implementation="someone/kernel")
    edit(folder, vision=True, auto_map=auto, _attn_implementation="someone/kernel", quantization_config={"a": 1})
    (folder / "code.py").write_text("raise SystemExit('the code of a model ran')")
    tower = encoder.load(str(folder))
    assert tower.tower.config._attn_implementation == "sdpa"
    assert type(tower.tower).__module__ == "transformers.models.clip.modeling_clip"


def test_a_local_folder_asks_nobody(models, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for kind in ("siglip", "clip", "qwen"):
        encoder.load(str(models[kind][1]))  # the network is forbidden here


def test_without_transformers(models, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    clip = save(tmp_path / "a.mkv", moving_square(2))
    code, _, complaint = vtok_run(capfd, "compress", clip, "--encoder", models["clip"][1], "--out", tmp_path / "out")
    assert code == 2 and one_sentence(complaint) and "pip install transformers" in complaint


def test_an_encoder_has_a_patch_of_its_own(models, tmp_path, capfd):
    clip = save(tmp_path / "a.mkv", moving_square(2))
    code, _, complaint = vtok_run(capfd, "compress", clip, "--encoder", models["clip"][1], "--patch", 16)
    assert code == 2 and one_sentence(complaint) and "got both" in complaint


def test_in_a_process(models, copy, tmp_path):
    clip = save(tmp_path / "a.mkv", moving_square(4, 64, 64))
    done = process("compress", clip, "--encoder", models["qwen"][1], "--out", tmp_path / "out")
    assert done.returncode == 0 and done.stderr == "" and "Qwen2.5-VL" in done.stdout
    folder = copy("clip")
    edit(folder, model_type="bert")
    done = process("compress", clip, "--encoder", folder, "--out", tmp_path / "not")
    assert done.returncode == 2 and done.stdout == "" and one_sentence(done.stderr)
