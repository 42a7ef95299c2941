# From a fresh clone, `make demo` and `make test` do all set-up. Every target may be called first.
#
# The Python used is PYTHON=..., or that of the active environment (also one that is only first on PATH), if torch is
# installed there; else .venv, which is made on the first run and sees the system's packages if torch is among them. An
# installed torch is never replaced.

SHELL := /bin/bash
TORCH := torch==2.13.0
CMAKE := cmake==3.31.10
EXTRAS := test,bench

PYTHON ?= python3
# Looking for torch instead of importing it keeps a call with nothing to do under a second.
HAS_TORCH := -c "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)" 2>/dev/null
VENV := $(CURDIR)/.venv
CANDIDATES := $(if $(filter-out default file,$(origin PYTHON)),$(PYTHON)) \
  $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python) $(if $(CONDA_PREFIX),$(CONDA_PREFIX)/bin/python) \
  $(shell python3 -c "import sys; sys.exit(sys.prefix == sys.base_prefix)" 2>/dev/null && echo python3)
PY := $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) $(HAS_TORCH) && command -v $(p))) $(VENV)/bin/python)

# Tools installed beside that Python (ninja, perhaps cmake) come first.
export PATH := $(dir $(PY)):$(PATH)
PREFIX := $(shell $(PY) -c "import sys; print(sys.prefix)" 2>/dev/null || echo $(VENV))
READY := $(PREFIX)/.unlearn_ext_ready
LINTED := $(PREFIX)/.unlearn_ext_lint

# The module in the package folder serves one environment: the stamp names it, and another one builds anew.
BUILT := build/built
BUILD_KEY = $$($(PY) -c "import importlib.metadata as m, sys; print(sys.prefix, m.version('torch'))" 2>/dev/null) \
  $(UNLEARN_CUDA) $(UNLEARN_CMAKE_ARGS)
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
ifneq ($(shell echo "$(BUILD_KEY)"),$(shell cat $(BUILT) 2>/dev/null))
  SOURCES += always
endif

NATIVE_FILES := git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh'

.PHONY: help setup build test demo bench gpu lint mypy format check-native check-kernels check-planted check-static check-traffic \
  check-cuda-build clean always
help:
	@echo "make demo              forget a class and 50 samples of handwritten digits, compare with retraining"
	@echo "make test              every test; ARGS='-k dampen' chooses, ARGS='-m slow' runs the slow ones"
	@echo "make bench             the benchmarks; rewrites bench/RESULTS.md"
	@echo "make gpu               build, prove and measure on a GPU, offline, in under ten minutes; ARGS='--data FILE' for"
	@echo "                       CIFAR-10, ARGS=--dry-run goes through it without a GPU"
	@echo "make docs              the documentation as a site in build/site; tutorials are run"
	@echo "make lint, format      ruff, mypy, clang-format; make mypy: types alone"
	@echo "make check-native      CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make check-portable    CPU kernels built with Clang, and for aarch64, run by QEMU (UNLEARN_REDUCED=1: part of the cases)"
	@echo "make check-kernels     CUDA kernels, executed on the CPU: values, memory errors, races"
	@echo "make check-planted     bugs planted in copies of the CUDA kernels: check-kernels must see each"
	@echo "make check-static      registers, occupancy and instructions of the CUDA kernels against their budgets; needs"
	@echo "                       nvcc, no GPU; ARGS=--update rewrites tests/native/budget.json"
	@echo "make check-fallback    the ops on their kernels in plain PyTorch: what runs where nothing is compiled"
	@echo "make check-install     the source archive, installed and used where there is no compiler"
	@echo "make wheel             the source archive and two wheels in dist: compiled for this torch, and for any platform"
	@echo "make check-traffic     bytes, sectors and passes of the CUDA kernels, counted on the CPU, against their budgets;"
	@echo "                       ARGS='[text] [--arrays] [--update]', which rewrites tests/native/traffic.json"
	@echo "make check-cuda-build  CUDA build: compiles and links, spills are errors; needs nvcc, no GPU"
	@echo "make check-faults      errors, interrupts and kills at every place of every call (hours; ARGS='--sample 5': minutes)"
	@echo "make setup, build      what every target does first: tools into the environment, the compiled module"
	@echo "make clean             removes what was built"

setup: $(READY)
build: $(BUILT)
always:

$(VENV)/bin/python:
	$(PYTHON) -m venv $$($(PYTHON) $(HAS_TORCH) && echo --system-site-packages) $(VENV)

# What the environment lacks, torch by its exact version so that no other build of it is ever fetched.
$(READY): pyproject.toml | $(PY)
	$(PY) $(HAS_TORCH) || $(PY) -m pip install -q $(TORCH)
	cmake --version 2>/dev/null | awk 'NR == 1 {split($$3, v, "."); ok = v[1] > 3 || v[2] >= 24} END {exit !ok}' \
	  || $(PY) -m pip install -q $(CMAKE)
	$(PY) -m pip install -q ninja wheel "setuptools>=68" $$($(PY) .ci/requirements.py $(EXTRAS))
	@touch $@

$(LINTED): pyproject.toml $(READY)
	$(PY) -m pip install -q $$($(PY) .ci/requirements.py dev)
	@touch $@

$(BUILT): $(SOURCES) $(READY)
	UNLEARN_BUILD=require $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@mkdir -p $(@D) && echo "$(BUILD_KEY)" >$@

# In a process per core where pytest-xdist is; ARGS='-n 0' in one.
test: build
	$(PY) -m pytest -q $$($(PY) -c "import importlib.util as u; print('-n auto --dist worksteal' * bool(u.find_spec('xdist')))") $(ARGS)

demo: build
	$(PY) -m unlearn_ext demo $(ARGS)

bench: build
	$(PY) -m bench $(ARGS)

# Builds for itself, with what is installed: where the GPU is there may be no network.
gpu: $(if $(findstring --dry-run,$(ARGS)),build)
	$(PY) -m bench.gpu $(ARGS)

lint: $(LINTED) mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(NATIVE_FILES) | xargs clang-format --dry-run -Werror

mypy: $(LINTED)
	$(PY) -m mypy

format: $(LINTED)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(NATIVE_FILES) | xargs clang-format -i

check-native: $(READY)
	tests/native/run.sh asan

check-kernels: $(READY)
	tests/native/check_kernels.sh

check-planted: $(READY)
	$(PY) tests/native/planted.py $(ARGS)

check-traffic: $(READY)
	PYTHON=$(PY) tests/native/run.sh traffic $(ARGS)

# One build of the CUDA objects serves both checks; its slowest file is compiled for two architectures at a time.
define configure_cuda
@command -v nvcc >/dev/null || { echo "make $@ needs nvcc, of CUDA 12.8 or later, on PATH: there is none" >&2; exit 1; }
cmake -S . -B build/cuda-check -G Ninja -DPython_EXECUTABLE=$(PY) -DUNLEARN_CUDA=ON -DUNLEARN_STRICT=ON -DCMAKE_CUDA_FLAGS=--threads=2 \
  "-DCMAKE_CUDA_ARCHITECTURES=80-real;86-real;89-real;90-real;100-real;120" >/dev/null
endef

check-static: $(READY)
	$(configure_cuda)
	cmake --build build/cuda-check --target kernels_cuda
	$(PY) tests/native/static_checks.py $(ARGS) build/cuda-check/CMakeFiles/kernels_cuda.dir/csrc/kernels/*.o

check-cuda-build: $(READY)
	$(configure_cuda)
	cmake --build build/cuda-check
	$(PY) .ci/import_build.py build/cuda-check

clean:
	rm -rf build dist unlearn_ext/_C.*.so unlearn_ext/_build_info.json unlearn_ext.egg-info

# ---- Without the compiled library, and packages to hand on

.PHONY: check-fallback check-install wheel
FALLBACK_TESTS := tests/test_op_edges.py tests/test_signatures.py tests/test_reference.py tests/test_ops.py tests/test_errors.py \
  tests/test_fallback.py tests/test_library.py tests/test_saliency.py tests/test_readme.py

# Lists of thousands and of large tensors are for the compiled kernels.
check-fallback: $(READY)
	UNLEARN_OPS=reference $(PY) -m pytest -q $(FALLBACK_TESTS) -k "not many and not large and not compiles and not opcheck" $(ARGS)

check-install: $(READY)
	.ci/install_check $(PY)

wheel: $(READY)
	$(PY) -m pip install -q $$($(PY) .ci/requirements.py wheel)
	rm -rf dist
	$(PY) -W ignore setup.py -q sdist -d dist
	PYTHON=$(PY) .ci/wheel dist
	UNLEARN_BUILD=off $(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist dist/*.tar.gz
	ls -l dist

# The documentation, into build/site: tutorials are run, links checked, and nothing is fetched but the tools.
DOCUMENTED := $(PREFIX)/.unlearn_ext_docs
.PHONY: docs
docs: build $(DOCUMENTED)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "build/site/index.html; with search: $(PY) -m http.server -d build/site"

$(DOCUMENTED): pyproject.toml $(READY)
	$(PY) -m pip install -q $$($(PY) .ci/requirements.py docs)
	@touch $@

# ---- Faults: what `make test` samples, at every place. ARGS='--sample N' tries N places of each call on each model.

.PHONY: check-faults
check-faults: build
	$(PY) tests/faults/everything.py $(ARGS)
	$(PY) tests/faults/kill_writers.py
	$(PY) tests/faults/op_fuzz.py
	$(PY) tests/faults/file_fuzz.py
	$(PY) -m pytest -q -n 0 -m slow -s tests/faults

# Random calls of every op with the extension under AddressSanitizer and UndefinedBehaviorSanitizer.

.PHONY: check-asan
check-asan: $(READY)
	PYTHON=$(PY) tests/faults/asan.sh $(ARGS)

# ---- CPU kernels by another compiler, and for another processor.

.PHONY: check-portable check-portable-clang check-portable-aarch64
check-portable: check-portable-clang check-portable-aarch64

check-portable-clang: $(READY)
	tests/native/run.sh clang

check-portable-aarch64: $(READY)
	tests/native/run.sh aarch64
