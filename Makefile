# make demo   set up everything (once) and run the main job on real photographs
# make test   set up everything (once) and run all checks and tests that need no GPU
#
# Needs Python 3.10+, a C++ compiler, make and git; uses nvcc and a GPU if they are there.
#   PYTHON=python3.12   the interpreter that makes the environment
#   VENV=path           environment to use, made if missing (default .venv)
#   JOBS=n              processes for pytest (default 2)
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
RUN := $(BIN)/python
RESULTS := build/demo

# Two builds: what a user installs, and with the test targets. The newer stamp wins; the second includes the first.
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
DEPS := $(VENV)/.fastres-deps
BUILT := $(VENV)/.fastres-built
BUILT_TESTS := $(VENV)/.fastres-built-tests
CXX_FILES := $(shell find csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

.PHONY: help setup demo test test-full sanitize sanitize-cpu lint format bench gpu-check clean

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo 'make test-full, sanitize, sanitize-cpu, bench, gpu-check, format, clean: see CONTRIBUTING.md'

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastres needs Python 3.10 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# Where no driver is, CUDA kernels could not run: they are built only if FASTRES_CUDA says so.
HAS_GPU := $(shell command -v nvidia-smi)
export FASTRES_CUDA ?= $(if $(HAS_GPU),auto,0)
ifneq ($(HAS_GPU),)
export FASTRES_CUDA_ARCHS ?= native
endif

# The package goes in without its compiled cores; those are built in place, so that a change rebuilds only itself.
PIP := $(RUN) -m pip install --disable-pip-version-check -q
$(DEPS): pyproject.toml | $(RUN)
	@echo 'installing PyTorch and the other dependencies: minutes, once'
	$(PIP) 'setuptools>=77' wheel cmake ninja pybind11
	FASTRES_CPU=0 FASTRES_CUDA=0 $(PIP) --no-build-isolation -e '.[test,dev]'
	touch $@

# The compilers' output is shown where the build fails; what was built, and what not and why, always.
LOG := build/build.log
BUILD = mkdir -p build; $(RUN) setup.py build_ext --inplace >$(LOG) 2>&1 || { cat $(LOG); exit 1; }; \
    grep -E '^(fastres: (built|fastres[.]_)|[*])' $(LOG) || true

$(BUILT): $(DEPS) $(SOURCES)
	@if [ -e $(BUILT_TESTS) ] && [ -z "$$(find $(DEPS) $(SOURCES) -newer $(BUILT_TESTS))" ]; then touch $@; \
	else echo 'building the compiled cores'; $(BUILD); touch $@; fi

$(BUILT_TESTS): $(DEPS) $(SOURCES)
	@echo 'building the compiled cores and the CUDA emulator'
	@export FASTRES_CPU=1 FASTRES_EMULATOR=1 FASTRES_TEST_ISAS=1; $(BUILD)
	touch $@

setup: $(BUILT)

demo: $(BUILT)
	@mkdir -p $(RESULTS)
	$(BIN)/fastres doctor --short
	$(BIN)/fastres bench resnet50 --images examples --batch 4 --seconds 20 \
	    --json $(RESULTS)/inference.json --png $(RESULTS)/inference.png
	$(BIN)/fastres bench resnet50 --images examples --batch 4 --seconds 30 --train \
	    --json $(RESULTS)/training.json --png $(RESULTS)/training.png
	@echo "Look at $(RESULTS)/inference.png and $(RESULTS)/training.png; every number with its provenance: *.json there."

lint: $(DEPS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# One thread a worker, or the workers' threads wait for each other; tests of threading ask for more themselves.
test: lint $(BUILT_TESTS)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest -n $(JOBS) --dist worksteal

test-full: test
	FASTRES_FULL=1 $(RUN) -m pytest -q tests/test_triton_codegen.py tests/test_conv_codegen.py \
	    tests/test_candidates_codegen.py tests/inference/test_random_blocks.py tests/inference/test_session.py \
	    tests/inference/test_cpu_engine.py
	$(RUN) benchmarks/gpu_check.py --dry-run

# The emulator under AddressSanitizer and UndefinedBehaviorSanitizer, in a package of its own under build/: the
# runtime must be loaded before Python. The first C++ exception needs libstdc++ to be there as well.
SANITIZED := build/sanitized
EMULATED_TESTS := tests/test_emulator.py tests/test_emulator_mma.py tests/test_emulator_hopper.py \
    tests/test_block_kernels.py tests/test_basic_block_kernel.py tests/test_stem_kernel.py \
    tests/test_hopper_blocks.py tests/test_rotated_stage.py tests/test_cuda_conv.py \
    tests/test_batch_norm_one_pass.py
RUNTIMES = $(foreach lib,asan ubsan stdc++,$(shell $${CXX:-c++} -print-file-name=lib$(lib).so))
sanitize: $(DEPS)
	FASTRES_CPU=0 FASTRES_CUDA=0 FASTRES_EMULATOR=1 FASTRES_SANITIZE=1 \
	    $(RUN) setup.py -q build --build-lib $(SANITIZED) --build-temp $(SANITIZED)-objects
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) OMP_NUM_THREADS=1 \
	    $(RUN) -P -m pytest -p no:cacheprovider $(EMULATED_TESTS) $(ARGS) \
	    --deselect tests/test_batch_norm_one_pass.py::test_static_shared_memory_is_what_nvcc_counts  # reads docs/

# The CPU kernels likewise, each instruction set; two threads, so that they share rows and panels.
CPU_TESTS := tests/test_cpu_conv.py tests/test_cpu_grouped.py tests/test_cpu_winograd.py tests/test_cpu_strassen.py \
    tests/test_cpu_matrix.py tests/test_cpu_pairs.py tests/test_defaults.py \
    tests/test_add_relu.py tests/test_batch_norm_act.py tests/test_stem.py tests/test_conv_bn_act.py \
    tests/inference/test_random_blocks.py tests/inference/test_cpu_engine.py tests/inference/test_matrix.py \
    tests/inference/test_fitting.py
sanitize-cpu: $(DEPS)
	FASTRES_CPU=1 FASTRES_CUDA=0 FASTRES_EMULATOR=0 FASTRES_TEST_ISAS=1 FASTRES_SANITIZE=1 \
	    $(RUN) setup.py -q build --build-lib $(SANITIZED)-cpu --build-temp $(SANITIZED)-cpu-objects
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)-cpu OMP_NUM_THREADS=2 \
	    $(RUN) -P -m pytest -p no:cacheprovider --backends cpu $(CPU_TESTS) $(ARGS) \
	    --deselect tests/inference/test_cpu_engine.py::test_memory_does_not_grow  # freed memory is kept to be watched

bench: $(BUILT)
	$(RUN) -m pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-only \
	    --benchmark-columns=median,iqr,rounds --benchmark-sort=name --benchmark-json=build/bench.json $(ARGS)

# The environment where there is one, else the system's Python with what it has: no download happens here.
gpu-check:
	@python="$(RUN)"; [ -x "$$python" ] || python="$(PYTHON)"; exec "$$python" benchmarks/gpu_check.py $(ARGS)

format: $(DEPS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info fastres/*.so fastres/_build.json .pytest_cache .ruff_cache .benchmarks
	rm -f $(DEPS) $(BUILT) $(BUILT_TESTS)
