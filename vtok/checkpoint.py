"""The files of a model in a folder or on the hub, read without trust: JSON and safetensors, never code or a pickle."""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import Tensor

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SHARD = re.compile(r"[\w.-]+\.safetensors")
SINGLE = "model.safetensors"


class EncoderError(ValueError):
    """One sentence about a model that can't be loaded or run."""


class Checkpoint:
    """A model by the name of its folder, or by its hub id where no such folder is."""

    def __init__(self, name: str) -> None:
        there = bool(name) and Path(name).exists()
        if (there and not Path(name).is_dir()) or not (there or HUB_NAME.fullmatch(name)):
            kind = "a file" if there else "which does not exist"
            raise EncoderError(f"expected the folder of a model or its hub id, got {name!r}, {kind}")
        self.name, self.local = name, there

    def file(self, filename: str) -> Path | None:
        """Where a file of the model is now, or None where it has none or the hub is out of reach."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        if self.local:
            path = Path(self.name, filename)
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, filename))
        except EntryNotFoundError:
            return None

    def json(self, filename: str) -> dict | None:
        """The JSON object in a file, or None without the file."""
        path = self.file(filename)
        content = {} if path is None else json.loads(path.read_text())
        if not isinstance(content, dict):
            raise EncoderError(f"expected an object in {filename} of {self.name!r}, got {type(content).__name__}")
        return None if path is None else content

    def weights(self, shapes: dict[str, tuple[int, ...]], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        """The weights of these names and shapes, each behind the first prefix that fits; other files stay closed."""
        from safetensors import safe_open

        files = self._files()
        first = next(iter(shapes))
        prefix = next((prefix for prefix in prefixes if prefix + first in files), "")
        for key in shapes:
            if prefix + key not in files:
                raise EncoderError(f"expected the weights of a vision tower in {self.name!r}, got none for {key!r}")
        weights = {}
        for filename in dict.fromkeys(files[prefix + key] for key in shapes):
            with safe_open(self.file(filename), "pt") as file:
                for key in (key for key in shapes if files[prefix + key] == filename):
                    shape = tuple(file.get_slice(prefix + key).get_shape())
                    if shape != shapes[key]:
                        raise EncoderError(f"expected {key!r} of shape {shapes[key]} in {self.name!r}, got {shape}")
                    weights[key] = file.get_tensor(prefix + key)
        return weights

    def _files(self) -> dict[str, str]:
        """The file of each weight of the whole model."""
        from safetensors import safe_open

        if path := self.file(SINGLE):
            with safe_open(path, "pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        files = (self.json(f"{SINGLE}.index.json") or {}).get("weight_map", {})
        if files and all(SHARD.fullmatch(filename) for filename in files.values()):
            return files
        raise EncoderError(
            f"expected weights in safetensors in {self.name!r}, got none; a pickle (.bin) is never opened"
        )
