"""Drives CMakeLists.txt. Environment: VTOK_CUDA=auto|on|off, VTOK_CUDA_ARCHS (CMake's list), VTOK_RELEASE=1 (refuses
auto), VTOK_PURE=1 (no compiler runs: the py3-none-any wheel)."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PURE = os.environ.get("VTOK_PURE") == "1"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("VTOK_CUDA", "auto").lower()
        if cuda not in ("auto", "on", "off"):
            sys.exit(f"expected VTOK_CUDA to be auto, on or off, got {cuda!r}")
        if os.environ.get("VTOK_RELEASE") == "1" and cuda == "auto":
            sys.exit("expected VTOK_CUDA=on or off in a release build, got auto")
        torch = importlib.util.find_spec("torch")
        if torch is None:
            sys.exit("expected torch >= 2.10 in the build environment, got none; its headers are needed")
        build = ROOT / "build" / "cmake"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DVTOK_CUDA={cuda}"]
        configure += [f"-DVTOK_TORCH={Path(torch.origin).parent}", f"-DPython3_EXECUTABLE={sys.executable}"]
        if archs := os.environ.get("VTOK_CUDA_ARCHS"):
            configure.append(f"-DVTOK_CUDA_ARCHS={archs}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")  # replaced in one step: a process may have the old one loaded
        shutil.copyfile(build / "_C.so", fresh)
        os.replace(fresh, target)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python tag: the library has no Python symbol


class AnyPythonWheel(bdist_wheel):
    """No Python symbol inside, so one wheel serves every CPython: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if PURE else super().get_tag()[2])


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return not PURE


# The folders triton_kernels/ and bench/ install inside vtok: the first name belongs to another package.
INSIDE = {"vtok.triton_kernels": "triton_kernels", "vtok.bench": "bench"}

setup(
    packages=sorted({*find_packages(include=["vtok", "vtok.*"]), *INSIDE}),
    package_dir=INSIDE,
    distclass=BinaryDistribution,
    ext_modules=[] if PURE else [Extension("vtok._C", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
