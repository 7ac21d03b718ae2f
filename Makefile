# What a developer runs. Everything goes into .venv and build/; the machine itself stays as it is.
PYTHON ?= python3
WORKERS ?= 2
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -q
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TRITON_CACHE_DIR := $(CURDIR)/build/triton
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'csrc/*.cuh' 'csrc/*.cu' 'tests/host/*')
PIP_WHEEL := $(PY) -m pip wheel -q --no-build-isolation --no-deps .
define wheels  # both, in folder $(1), the binary one with the environment $(2); stale lib folders would be packed
	rm -rf $(1) build/lib* build/bdist*
	$(2) $(PIP_WHEEL) -w $(1)
	VTOK_PURE=1 $(PIP_WHEEL) -w $(1)
endef

.PHONY: help venv build host host-asan test test-main test-triton sanitize gates some-mutants mutants lint format \
        budget demo bench gpu wheel compat clean

help:
	@echo "make venv | build | host     the environment, the library, the CUDA kernels built for the host"
	@echo "make test                    everything that needs no GPU (CI runs this and lint)"
	@echo "make demo | bench | gpu      compress a clip | measure here | tests and measurements on a GPU"
	@echo "make lint | format           ruff, clang-format, mypy"
	@echo "make mutants | budget        every planted bug must turn a test red | rewrite bench/budget.json"
	@echo "make wheel | compat | clean  release wheels into dist/ | try them on the oldest and newest torch"

venv: .venv/stamp
.venv/stamp: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python 3.11 or newer for development")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

build: venv
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .

CMAKE_HOST = cmake -G Ninja -S . -DVTOK_HOST_MODULE=ON -DPython3_EXECUTABLE=$(CURDIR)/$(PY) \
             -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) --log-level=WARNING
host: venv
	$(CMAKE_HOST) -B build/host
	cmake --build build/host
host-asan: venv
	$(CMAKE_HOST) -B build/host-asan -DVTOK_SANITIZE=address,undefined
	cmake --build build/host-asan

test: test-main test-triton sanitize gates some-mutants
test-main: build host
	$(PYTEST) -n $(WORKERS) tests
test-triton: build
	TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) tests/triton
sanitize: build host-asan
	$(PY) tests/sanitized.py build/host-asan -q -n $(WORKERS) tests
gates: build
	$(call wheels,build/wheels)
	$(PYTEST) -n $(WORKERS) tests/gates
some-mutants: build host
	$(PYTEST) -n $(WORKERS) tests/mutants
mutants: build host
	$(PYTEST) -n $(WORKERS) tests/mutants --sweep

lint: venv
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP)
	mypy
format: venv
	ruff check --fix-only -q .
	ruff format -q .
	clang-format -i $(CPP)

budget: build
	PYTHONPATH=tests $(PY) tests/gates/budget.py

demo: build
	$(PY) tools/fetch_clip.py .cache/carphone_pristine.mp4
	vtok compress .cache/carphone_pristine.mp4 --fps 6 --keep 25% --out vtok-demo --force
	@echo "The pictures are in vtok-demo/"
bench: build
	$(PY) -m vtok bench
gpu:
	$(PYTHON) tools/gpu.py

wheel: build
	$(call wheels,dist,VTOK_RELEASE=1 VTOK_CUDA=on)
	VTOK_WHEELS=dist $(PYTEST) tests/gates/test_wheel.py
	$(PY) -m wheel tags --platform-tag manylinux_2_34_x86_64 --remove dist/*-linux_x86_64.whl
	@ls -l dist
compat: wheel
	$(PYTHON) tools/compat.py dist

clean:
	rm -rf build dist vtok.egg-info vtok/_C.so .pytest_cache .hypothesis .mypy_cache .ruff_cache vtok-demo
