"""The vLLM plugin, on a stand-in of the engine's modules and on its real ones where there are any.

VTOK_VLLM_SOURCE names a folder with an unpacked wheel of vLLM (``vllm/`` in it); an installed vLLM serves too. Only the
pure Python of its video pruning is imported: the packages above it are stubs.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tomllib
import torch

from vtok import methods
from vtok.integrations import retained_tokens_count, retention_mask
from vtok.integrations import vllm as plugin

from rooms import ROOT

EVS = plugin.ENGINE
STAND_IN = """
def compute_retained_tokens_count(tokens_per_frame, num_frames, q):
    return max(tokens_per_frame, int(tokens_per_frame * num_frames * (1 - q)))


def compute_retention_mask(video_embeds, video_size_thw, spatial_merge_size, q):
    raise AssertionError("the engine's own mask ran")
"""


def source() -> Path | None:
    """The folder vllm/ of an engine, never imported as a whole."""
    if folder := os.environ.get("VTOK_VLLM_SOURCE"):
        return Path(folder) / "vllm"
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent if spec and spec.origin else None


def package(monkeypatch, name, path=None):
    module = ModuleType(name)
    module.__path__ = [str(path)] if path else []
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture(params=["stand-in", "real"])
def engine(request, monkeypatch):
    """The module of the EVS mask, fresh, under its name in sys.modules."""
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    folder = source() if request.param == "real" else None
    if request.param == "real" and folder is None:
        pytest.skip("no vLLM here: VTOK_VLLM_SOURCE names no unpacked wheel, and none is installed")
    for name in ("vllm", "vllm.multimodal", "vllm.multimodal.video_prune"):
        package(monkeypatch, name, folder and folder.parent / name.replace(".", "/"))
    if folder:
        module = importlib.import_module(EVS)
        monkeypatch.setitem(sys.modules, EVS, module)  # so that it goes again
        return module
    module = package(monkeypatch, EVS)
    exec(STAND_IN, vars(module))
    return module


def choose(monkeypatch, method, options=None):
    monkeypatch.setenv(plugin.METHOD, method)
    if options is not None:
        monkeypatch.setenv(plugin.OPTIONS, options)


def clip(frames=6, height=4, width=6, channels=16):
    return torch.randn(frames * height * width, channels), (frames, 2 * height, 2 * width)


def test_without_the_variable_nothing_happens(engine, monkeypatch):
    before = dict(vars(engine))
    monkeypatch.delenv(plugin.METHOD, raising=False)
    plugin.register()
    choose(monkeypatch, "")
    plugin.register()
    assert vars(engine) == before


@pytest.mark.parametrize("method", ["evs", "random", "uniform"])
@pytest.mark.parametrize("q", [0.0, 0.5, 0.9])
def test_the_mask_is_ours_with_their_count(engine, monkeypatch, method, q):
    choose(monkeypatch, method)
    plugin.register()
    rows, size = clip()
    mask = engine.compute_retention_mask(rows, list(size), spatial_merge_size=2, q=q)
    assert torch.equal(mask, retention_mask(rows, size, 2, q, method=method))
    assert mask.dtype == torch.bool and int(mask.sum()) == engine.compute_retained_tokens_count(24, 6, q)
    for given in (torch.tensor(size), size):
        again = engine.compute_retention_mask(video_embeds=rows, video_size_thw=given, spatial_merge_size=2, q=q)
        assert torch.equal(again, mask)


def test_early_and_late_importers(engine, monkeypatch):
    early = package(monkeypatch, "vllm.model_executor.early")
    early.compute_retention_mask = early.mask_fn = original = engine.compute_retention_mask
    other = package(monkeypatch, "vllm_of_another")
    other.compute_retention_mask = original
    package(monkeypatch, "vllm.lazy").__getattr__ = lambda name: pytest.fail("a lazy module was asked")
    choose(monkeypatch, "uniform")
    plugin.register()
    late = package(monkeypatch, "vllm.model_executor.late")
    exec(f"from {EVS} import compute_retention_mask", vars(late))
    ours = engine.compute_retention_mask
    assert ours.vtok_method == "uniform" and ours is not original
    assert early.compute_retention_mask is early.mask_fn is late.compute_retention_mask is ours
    assert other.compute_retention_mask is original
    plugin.register()
    choose(monkeypatch, "random")
    plugin.register()
    assert engine.compute_retention_mask is early.compute_retention_mask is ours


def test_options(engine, monkeypatch):
    choose(monkeypatch, "random", '{"seed": 7}')
    plugin.register()
    rows, size = clip()
    mask = engine.compute_retention_mask(rows, size, 2, 0.75)
    assert torch.equal(mask, retention_mask(rows, size, 2, 0.75, method="random", seed=7))
    assert not torch.equal(mask, retention_mask(rows, size, 2, 0.75, method="random"))


@pytest.fixture
def unfit(monkeypatch):
    """Methods that no engine can plan for."""
    monkeypatch.setattr(methods, "_methods", dict(methods._methods))

    @methods.register("asks")
    def asks(tokens, layout, plan, *, query):
        return tokens @ query

    @methods.register("merges")
    def merges(tokens, layout, plan):
        return tokens[: layout.total // 2, 0]


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("magic", None, "got 'magic': expected one of the methods"),
        ("asks", None, "'query'"),
        ("merges", None, "'merges'"),
        ("evs", '{"budget": 100}', "got budget"),
        ("evs", '{"compat": "hf"}', "compat"),
        ("evs", "{", "VTOK_VLLM_OPTIONS to be a JSON object, got '{'"),
        ("evs", "[1]", "VTOK_VLLM_OPTIONS to be a JSON object"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(engine, monkeypatch, unfit, method, options, words):
    before = engine.compute_retention_mask
    choose(monkeypatch, method, options)
    with pytest.raises(ValueError, match="expected VTOK_VLLM") as caught:
        plugin.register()
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert engine.compute_retention_mask is before


def test_another_count_is_noticed_at_the_call(engine, monkeypatch):
    choose(monkeypatch, "evs")
    plugin.register()
    rows, size = clip()
    monkeypatch.setattr(engine, plugin.COUNT, lambda tokens_per_frame, num_frames, q: 99)
    with pytest.raises(RuntimeError, match=r"expected the engine to plan 36 rows of 6 x 24 at 0\.75, got 99"):
        engine.compute_retention_mask(rows, size, 2, 0.75)


def test_another_engine_is_refused_at_the_start(engine, monkeypatch):
    choose(monkeypatch, "evs")
    monkeypatch.setattr(engine, plugin.MASK, lambda embeds, size: None)
    with pytest.raises(RuntimeError, match=r"compute_retention_mask of vLLM 0.33 with the arguments .* got \['embeds'"):
        plugin.register()
    monkeypatch.delattr(engine, plugin.MASK)
    with pytest.raises(RuntimeError, match=r"compute_retention_mask of vLLM 0\.33"):
        plugin.register()
    monkeypatch.setitem(sys.modules, EVS, None)
    with pytest.raises(RuntimeError, match=r"expected vLLM 0\.33 for VTOK_VLLM_METHOD"):
        plugin.register()


def test_the_entry_point():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    points = groups["vllm.general_plugins"]
    assert list(points) == ["vtok"]
    load = importlib.metadata.EntryPoint("vtok", points["vtok"], "vllm.general_plugins").load
    assert load() is plugin.register


def test_the_plugin_alone_imports_no_engine():
    code = "import sys; from vtok.integrations.vllm import register; register(); assert 'vllm' not in sys.modules"
    environment = {key: value for key, value in os.environ.items() if key != plugin.METHOD} | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# The real engine alone


@pytest.mark.parametrize("engine", ["real"], indirect=True)
def test_evs_is_the_engines_own(engine, monkeypatch):
    theirs = engine.compute_retention_mask
    choose(monkeypatch, "evs", '{"compat": "vllm"}')
    plugin.register()
    for frames, q, dtype in [(1, 0.5, torch.float32), (2, 0.7, torch.float32), (9, 0.9, torch.bfloat16)]:
        still, size = clip(1, channels=64)
        rows = (still + 0.1 * torch.randn(frames, *still.shape)).flatten(0, 1).to(dtype)
        arguments = rows, (frames, *size[1:])
        want = theirs(*arguments, spatial_merge_size=2, q=q)
        assert torch.equal(engine.compute_retention_mask(*arguments, spatial_merge_size=2, q=q), want)


@pytest.mark.parametrize("engine", ["real"], indirect=True)
def test_counts_are_the_engines_own(engine):
    for sites, frames in [(240, 16), (196, 32), (120, 32), (1, 1), (7, 3)]:
        for q in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99):
            assert retained_tokens_count(sites, frames, q) == engine.compute_retained_tokens_count(sites, frames, q)


@pytest.mark.parametrize("engine", ["real"], indirect=True)
def test_the_models_call_it_as_we_take_it(engine, monkeypatch):
    choose(monkeypatch, "evs")
    plugin.register()
    takes = inspect.signature(engine.compute_retention_mask)
    callers = {}
    for path in sorted((source() / "model_executor" / "models").glob("*.py")):
        if plugin.MASK in path.read_text():
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            named = [c for c in calls if getattr(c.func, "id", "") in (plugin.MASK, "mask_fn")]
            for call in named:
                takes.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
            callers[path.stem] = len(named)
    assert {"qwen2_5_vl", "qwen3_vl", "nano_nemotron_vl"} <= set(callers) and all(callers.values())
