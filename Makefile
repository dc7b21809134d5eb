# make setup      .venv from requirements.lock, kernels compiled, vlkernels installed; the others do it first
# make pretrain   train the quickstart
# make uniter     train UNITER, small, on built-in scenes
# make systems    train every recipe at a small size (hours; goes on where it was cut off); docs/SYSTEMS.md tells what each learnt
# make test       the test suite                 make test-gpu   the tests that need a card
# make bench      kernels against PyTorch, CPU   make bench-gpu  kernels against their peers, on a card
# make bench-gpu-steps   whole training steps on a card, beside padded models
# make bench-gpu-dry   its calls and peers without a card, every Triton kernel they would launch compiled
# make static     compile the Triton kernels for three architectures: registers, spills, tensor-core instructions
# make build      recompile the kernels, after an edit in csrc
#
# PYTHON   the interpreter .venv is made from (3.10 or later)
# BENCH    more options of bench (under 15 minutes) and bench-gpu (8): --missing times the rows that are left, --op pack one op
# SETUP=0  no .venv: use PYTHON as it is, with the versions it has; only the kernels are compiled, in place

PYTHON ?= python3
SETUP ?= 1
SHELL := /bin/bash
.PHONY: setup build pretrain uniter systems test test-gpu bench bench-gpu bench-gpu-dry bench-gpu-steps static clean

ifeq ($(SETUP),0)
RUN := $(PYTHON)
DEEPSPEED := deepspeed
setup:
	@$(RUN) setup.py -q build_ext --inplace
else
RUN := .venv/bin/python
DEEPSPEED := .venv/bin/deepspeed
setup: .venv/.installed
	@:
endif

PIP := .venv/bin/python -m pip -qq --disable-pip-version-check --no-input
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f -not -name '*.md' -not -path 'csrc/emulator/*')
ANOTHER := or choose another with make PYTHON=...

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is not Python 3.10 or later: install one, $(ANOTHER)"; exit 1; }
	@[ -x .venv/bin/python ] || $(PYTHON) -c 'import venv, ensurepip' 2> /dev/null \
		|| { echo "$(PYTHON) has no venv: install it (Debian: apt install python3-venv), $(ANOTHER)"; exit 1; }
	@[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	@touch $@

.venv/.locked: requirements.lock .venv/.python
	@echo "Installing requirements.lock (minutes, the first time)"
	@$(PIP) install -r requirements.lock
	@touch $@

.venv/.installed: .venv/.locked pyproject.toml $(NATIVE)
	@echo "Compiling the kernels and installing vlkernels"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@[ ! -f vlkernels/_C.missing ] || { echo "*** The compiled kernels were NOT built; all runs on the" \
		"reference, more slowly. make build tries again. The reason:"; cat vlkernels/_C.missing; }
	@touch $@

build:
	@VLKERNELS_REQUIRE_BUILD=1 $(RUN) setup.py -q build_ext --inplace

pretrain: setup
	$(DEEPSPEED) engine/pretrain.py --config engine/recipes/quickstart.yaml

uniter: setup
	$(DEEPSPEED) engine/pretrain.py --config engine/recipes/uniter_scenes.yaml

systems: setup
	$(RUN) -m benchmarks.systems

# Two workers of one thread each; the tests of a file share a worker and its fixtures.
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --timeout 600 tests

test-gpu: setup
	$(RUN) -m pytest -m gpu tests

LARGE_LOSSES := --op contrastive_loss --op sigmoid_loss --benchmark n8192_d512 --benchmark n16384_d512

bench: setup
	$(RUN) -m benchmarks.run --device cpu $(BENCH)
	$(RUN) -m benchmarks.run --device cpu --heap default $(LARGE_LOSSES)
	$(RUN) -m benchmarks.host_cost --device cpu
	$(RUN) -m benchmarks.plain_quickstart --seconds 12
	$(RUN) -m benchmarks.train_step --device cpu
	$(RUN) -m benchmarks.zero_step --device cpu
	$(RUN) -m benchmarks.report

bench-gpu-dry: setup
	$(RUN) -m benchmarks.run --dry-run $(BENCH)
	$(RUN) -m benchmarks.train_step --device cuda --dry-run

bench-gpu-steps: setup
	$(RUN) -m benchmarks.train_step --device cuda
	$(RUN) -m benchmarks.zero_step --device cuda

bench-gpu: setup
	$(RUN) -m benchmarks.run --device cuda $(BENCH)
	$(RUN) -m benchmarks.host_cost --device cuda

static: setup
	$(RUN) -m benchmarks.static

clean:
	rm -rf .venv build vlkernels/_C.so vlkernels/_C.missing *.egg-info
