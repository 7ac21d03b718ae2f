"""Seeds, poisoned allocations, and the options of the suite."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from rooms import ROOT

torch.utils.deterministic.fill_uninitialized_memory = True  # new_empty is NaN or INT_MAX, in C++ too
torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_addoption(parser):
    parser.addoption("--sweep", action="store_true", help="also run the long sweeps")


def pytest_configure(config):
    hypothesis.settings.register_profile("repeatable", derandomize=True)
    if not config.getoption("--sweep"):
        hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "host_kernels" in item.fixturenames:
            item.add_marker("host")
    if not config.getoption("--sweep"):
        skip = pytest.mark.skip(reason="a long sweep; run with --sweep")
        for item in items:
            if "sweep" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded(request):
    """The same random numbers for a test whatever ran before it."""
    seed = int(hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8], 16)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def host_kernels():
    """The CUDA kernels built for the host (make host); VTOK_HOST_DIR names another build, e.g. a sanitized one."""
    folder = Path(os.environ.get("VTOK_HOST_DIR", ROOT / "build" / "host"))
    found = sorted(folder.glob("vtok_host*.so"))
    assert found, f"no host build of the kernels in {folder}: run make host"
    spec = importlib.util.spec_from_file_location("vtok_host", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clip(tmp_path):
    """A lossless file of a white square that crosses a static texture."""
    from clips import moving_square, save

    return save(tmp_path / "square.mkv", moving_square())
