"""The wheels: what is in them, what they need, and that they run in a clean environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from vtok import _load

from rooms import ROOT

NEEDED = {
    "libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6",
    "ld-linux-x86-64.so.2", "libdl.so.2", "librt.so.1", "libpthread.so.0",
}  # fmt: skip
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}
ABSENT_IN_CPU_TORCH = {"aoti_torch_get_current_cuda_stream"}


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheels() -> dict[str, Path]:
    """The wheels that make gates built, or those in VTOK_WHEELS."""
    folder = ROOT / os.environ.get("VTOK_WHEELS", "build/wheels")
    found = {kind: sorted(folder.glob(f"*-{kind}*.whl")) for kind in ("linux", "any")}
    assert all(found.values()), f"expected a wheel of each kind in {folder}: run make gates"
    return {kind: paths[0] for kind, paths in found.items()}


@pytest.fixture(scope="session")
def library(wheels, tmp_path_factory) -> Path:
    with zipfile.ZipFile(wheels["linux"]) as wheel:
        return Path(wheel.extract("vtok/_C.so", tmp_path_factory.mktemp("library")))


@pytest.fixture(scope="session")
def install(wheels, tmp_path_factory):
    """The Python of a clean environment with one wheel in it, and this one's torch."""

    def installed(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(f"venv-{kind}")
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        python = folder / "bin" / "python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheels[kind])
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(site) / "torch-of-the-tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return python

    return installed


def test_names_and_contents(wheels):
    assert re.fullmatch(r"vtok-[\d.]+-py3-none-any\.whl", wheels["any"].name)
    assert re.fullmatch(r"vtok-[\d.]+-py3-none-linux_x86_64\.whl", wheels["linux"].name)
    assert wheels["linux"].stat().st_size < 20e6
    for kind, wheel in wheels.items():
        names = zipfile.ZipFile(wheel).namelist()
        tops = {name.partition("/")[0] for name in names}
        assert all(top == "vtok" or top.endswith(".dist-info") for top in tops)  # no top-level triton_kernels
        assert ("vtok/_C.so" in names) == (kind == "linux")
        rooms = {f"vtok/{path.relative_to(ROOT / 'vtok')}" for path in (ROOT / "vtok" / "ops").glob("*.py")}
        rooms |= {f"vtok/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}
        rooms |= {f"vtok/bench/{path.name}" for path in (ROOT / "bench").glob("*.py")}
        assert rooms | {"vtok/py.typed"} <= set(names)
        assert all(name.endswith((".py", ".so", "py.typed")) for name in names if name.startswith("vtok/"))


def test_libraries(library):
    dynamic = run("readelf", "-dW", library)
    assert set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)) <= NEEDED
    assert "libtorch.so" in dynamic  # torch loads its own libraries privately, so their symbols must be asked for
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


def test_symbols(library):
    table = [line.split()[-2:] for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    unversioned = {name for kind, name in table if kind == "U" and "@" not in name}
    torch_2_10 = set(Path(__file__).with_name("torch_2_10_symbols.txt").read_text().split())
    assert unversioned and unversioned <= torch_2_10
    assert not any(re.match(r"_?Py[A-Z_]", name) for _, name in table)
    weak = {name for kind, name in table if kind == "w" and "torch" in name}
    assert weak == (ABSENT_IN_CPU_TORCH if _load.cuda_ops else set())
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    assert exported == {"vtok_cpu_isa"}


def test_no_folder_of_the_build_machine_is_named(library):
    content = library.read_bytes()
    for folder in (ROOT, sys.prefix, sysconfig.get_path("purelib")):
        assert os.fsencode(str(folder) + "/") not in content, folder


def test_versions(library):
    for name, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", run("readelf", "-VW", library)):
        assert tuple(map(int, version.split("."))) <= NEWEST[name], f"{name}_{version}"


def test_no_wide_instruction_leaks_into_the_baseline():
    """A weak symbol of a unit compiled for AVX could replace the baseline's own at link time."""
    units = sorted((ROOT / "build" / "cmake" / "CMakeFiles" / "vtok_C.dir" / "generated").glob("*_cpu_*.o"))
    assert units
    for unit in units:
        assert not re.findall(r"^\S* [WVu] .*$", run("nm", "-C", unit), re.M), unit.name


SMOKE = """
import pathlib, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, vtok
    caught = [w for w in caught if "vtok" in str(w.message)]
from vtok.ops._rooms import ROOMS
assert pathlib.Path(vtok.__file__).is_relative_to(sys.prefix), vtok.__file__
assert len(caught) == int(sys.argv[2]), caught
for op, room in ROOMS.items():
    assert vtok.backend_of(op, "cpu") == sys.argv[1]
    assert str(getattr(torch.ops.vtok, op).default._schema) == "vtok::" + room.SCHEMA
x = torch.arange(12.0).view(4, 3)
assert torch.equal(vtok.ops.pack(x, torch.tensor([2, -1])), torch.stack([x[2], torch.zeros(3)]))
"""


@pytest.mark.parametrize("kind, backend, complaints", [("linux", "cpp", "0"), ("any", "reference", "1")])
def test_runs_in_a_clean_environment(install, tmp_path, kind, backend, complaints):
    run(install(kind), "-c", SMOKE, backend, complaints, cwd=tmp_path)


def test_contract_holds_without_the_binary(install, tmp_path):
    """What of the contract torch itself sees, on the references that serve alone."""
    options = ["-q", "-p", "no:cacheprovider", "-k", "errors or gradients or exports"]
    command = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    files = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml", ROOT / "tests" / "test_contract.py"]
    assert " passed" in run(install("any"), "-c", command, *options, *files, cwd=tmp_path)
