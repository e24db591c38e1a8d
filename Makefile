# `make demo` and `make test` set up everything they need in .venv; a second call re-uses what is there.
#
# torch comes first, so that nothing pulls another one. Where a CPU build is wanted from an index of its own, say so to
# pip as usual, for instance: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
# torchaudio is never installed: its registry build cannot load beside a CPU torch.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH := torch==2.13.0
FAIRSEQ := fairseq-fixed==0.12.3.1

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := constraints.txt
INSTALL := $(PIP) install --quiet --constraint $(CONSTRAINTS)

PACKAGE_FILES := $(sort $(shell find fairseq_moe_opt hf_integration -name '*.py' -o -name py.typed -o -name '*.cpp' -o -name '*.inc'))

# Transformers 4.57.1, the last line that computes NLLB-MoE right, cannot share an environment with 5.x: it lives in a
# folder of its own that goes to the front of PYTHONPATH, with torch and all else from .venv.
REFERENCE := .reference/transformers-4.57.1
REFERENCE_PINS := transformers==4.57.1 huggingface-hub==0.36.2 tokenizers==0.22.2 \
	requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.2 idna==3.20 certifi

.PHONY: help demo test test-gpu lint style bench bench-transformers bench-fairseq
.PHONY: bench-exchange bench-buffering bench-nllb54b bench-profiling bench-kernels bench-gpu bench-tables docs-check reproduce
.PHONY: setup reference clean distclean FORCE test-compat test-old-cpu test-single-core test-no-compiler
.PHONY: test-oldest bench-families bench-around

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | column -t -s @ 2>/dev/null \
		|| sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1: \2/p' $(MAKEFILE_LIST)

demo: $(STAMPS)/project $(STAMPS)/fairseq ## translate the demo's test set with the demo checkpoint (DEMO_ARGS=...)
	$(BIN)/python examples/demo/run.py $(DEMO_ARGS)

# Most tests compute on one thread, or wait for a process that does. A file's tests share what they set up.
TEST_WORKERS ?= 2

test: $(STAMPS)/project $(STAMPS)/fairseq ## run the tests (PYTEST_ARGS=..., TEST_WORKERS=0 for one process)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-gpu: $(STAMPS)/project $(STAMPS)/fairseq ## run the tests that need a CUDA device
	$(BIN)/python -m pytest --device cuda -m gpu $(PYTEST_ARGS)

test-compat: test-old-cpu test-single-core test-no-compiler test-oldest ## run the tests as on four other machines

test-old-cpu: $(STAMPS)/project $(STAMPS)/fairseq ## run the tests with no vector instructions beyond the oldest CPU's
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest $(PYTEST_ARGS)

test-single-core: $(STAMPS)/project $(STAMPS)/fairseq ## run the tests with one core for them and all they start
	core=$$($(BIN)/python -c 'import os; print(min(os.sched_getaffinity(0)))'); \
	taskset --cpu-list "$$core" $(BIN)/python -m pytest $(PYTEST_ARGS)

# A copy of the tree that no kernel was ever built in, and an installation of it, both where every compiler fails.
BARE := $(VENV)/no-compiler
NO_COMPILER := env --unset=MOE_OPT_FUSED CC=/bin/false CXX=/bin/false

test-no-compiler: $(STAMPS)/project $(STAMPS)/fairseq ## install without a compiler, and run the tests there
	rm -rf $(BARE)
	mkdir -p $(BARE)/tree
	tar --create --exclude=./.venv --exclude=./.reference --exclude=./.git --exclude='*.so' . \
		| tar --extract --directory $(BARE)/tree
	$(NO_COMPILER) $(INSTALL) --no-deps --no-build-isolation --target $(BARE)/installed $(BARE)/tree
	rm -rf $(BARE)/tree/build $(BARE)/tree/*.egg-info
	cd $(BARE)/installed && $(NO_COMPILER) ../../bin/python -c 'from fairseq_moe_opt.moe.kernels import available_kernels as \
		there; print("kernels:", *there()); assert "fused" not in there()'
	cd $(BARE)/tree && $(NO_COMPILER) PYTHONPATH=$$PWD ../../bin/python -m pytest $(PYTEST_ARGS)

test-oldest: ## run the tests with the oldest torch, Transformers and others that setup.py allows
	$(MAKE) test VENV=$(VENV)/oldest TORCH=torch==2.10.0 CONSTRAINTS=constraints-oldest.txt

lint: $(STAMPS)/dependencies ## ruff, and mypy (strict on the engine)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMPS)/dependencies ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: ## run all benchmarks, and draw the tables of README.md and docs/ again
	$(MAKE) bench-transformers bench-fairseq bench-exchange bench-buffering bench-nllb54b bench-profiling bench-kernels \
		bench-families
	$(MAKE) bench-tables

bench-transformers: $(STAMPS)/project $(REFERENCE) ## generation against Transformers 4.57.1 and 5.x (BENCH_ARGS=...)
	$(BIN)/python benchmarks/generate.py --reference $(REFERENCE) $(BENCH_ARGS)

bench-around: $(STAMPS)/project $(REFERENCE) ## where a forward's time goes besides the experts (AROUND_BENCH_ARGS=...)
	$(BIN)/python benchmarks/around.py --reference $(REFERENCE) $(AROUND_BENCH_ARGS)

bench-fairseq: $(STAMPS)/project $(STAMPS)/fairseq ## fairseq with static and dynamic gating (FAIRSEQ_BENCH_ARGS=...)
	$(BIN)/python benchmarks/fairseq_generate.py $(FAIRSEQ_BENCH_ARGS)

bench-exchange: $(STAMPS)/project ## what ranks send each other, and for how long (EXCHANGE_BENCH_ARGS=...)
	$(BIN)/python benchmarks/exchange.py $(EXCHANGE_BENCH_ARGS)

bench-buffering: $(STAMPS)/project $(REFERENCE) ## buffered experts against resident ones (BUFFERING_BENCH_ARGS=...)
	$(BIN)/python benchmarks/buffering.py --reference $(REFERENCE) $(BUFFERING_BENCH_ARGS)

# With all 128 experts: 54 GiB of disk, 20 GiB of memory: make bench-nllb54b NLLB54B_ARGS='--folder PATH'
NLLB54B_ARGS ?= --experts 16

bench-nllb54b: $(STAMPS)/project ## NLLB-MoE-54B's shape with buffered experts (NLLB54B_ARGS=..., or 16 experts a layer)
	$(BIN)/python benchmarks/nllb54b.py $(NLLB54B_ARGS)

bench-profiling: $(STAMPS)/project ## what profiling costs, on and off (PROFILING_BENCH_ARGS=...)
	$(BIN)/python benchmarks/profiling.py $(PROFILING_BENCH_ARGS)

bench-kernels: $(STAMPS)/project ## what computes the experts, against the memory's speed and a dense FFN (KERNELS_BENCH_ARGS=...)
	$(BIN)/python benchmarks/kernels.py $(KERNELS_BENCH_ARGS)

bench-gpu: $(STAMPS)/project ## the same on a CUDA device (GPU_BENCH_ARGS=...); not part of `make bench`
	$(BIN)/python benchmarks/kernels_gpu.py $(GPU_BENCH_ARGS)

bench-families: $(STAMPS)/project ## every model family beside each of Transformers' ways (FAMILIES_BENCH_ARGS=...)
	$(BIN)/python benchmarks/families.py $(FAMILIES_BENCH_ARGS)

bench-tables: $(STAMPS)/project ## draw the tables of README.md and docs/ from the result files
	$(BIN)/python benchmarks/tables.py

docs-check: $(STAMPS)/project $(STAMPS)/fairseq ## run the commands of README.md and docs/, the long ones too
	$(BIN)/python -m pytest tests/docs --docs-long $(PYTEST_ARGS)

reproduce: $(STAMPS)/project ## the paper's tables and figures, here, in up to an hour (REPRODUCE_ARGS=--quick: 10 minutes)
	$(BIN)/moe-opt reproduce $(REPRODUCE_ARGS)

setup: $(STAMPS)/project $(STAMPS)/fairseq ## set up .venv and run nothing

reference: $(REFERENCE) ## Transformers 4.57.1 in a side folder

clean: ## remove builds and caches
	rm -rf build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -not -path './.reference/*' -prune -exec rm -rf {} +

distclean: clean ## also remove .venv and the side folders
	rm -rf $(VENV) .reference

$(STAMPS)/venv:
	@if [ -z "$(PYTHON)" ]; then echo "no python3 found: install Python 3.10 or newer" >&2; exit 1; fi
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
		echo "$(PYTHON) is too old: Python 3.10 or newer is needed (PYTHON=... chooses one)" >&2; exit 1; fi
	@if ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$(PYTHON) has no venv: apt-get install python3-venv" >&2; exit 1; fi
	"$(PYTHON)" -m venv --clear $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# The order matters: torch, then what builds need, then the rest, which finds both in place.
$(STAMPS)/dependencies: $(STAMPS)/venv setup.py $(CONSTRAINTS)
	$(INSTALL) $(TORCH)
	$(INSTALL) numpy cython 'setuptools<81' wheel
	rm -rf build *.egg-info
	$(INSTALL) --no-build-isolation '.[all]'
	rm -rf build *.egg-info
	touch $@

# Its own requirements, less torchaudio, are the fairseq extra; its build needs the torch that is here.
$(STAMPS)/fairseq: $(STAMPS)/dependencies
	@include=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["include"])'); \
	if ! command -v g++ >/dev/null || [ ! -f "$$include/Python.h" ]; then \
		echo "fairseq is compiled here: apt-get install g++ python3-dev" >&2; exit 1; fi
	@echo 'installing $(FAIRSEQ); compiling it takes about four minutes, once'
	$(INSTALL) --no-build-isolation --no-deps $(FAIRSEQ)
	touch $@

# Not editable, so that `--user-dir fairseq_moe_opt` resolves from any folder; installed again when a source changed.
$(STAMPS)/project: $(STAMPS)/dependencies $(STAMPS)/files $(PACKAGE_FILES)
	rm -rf build *.egg-info
	$(INSTALL) --no-deps --no-build-isolation --force-reinstall .
	$(BIN)/python setup.py --quiet build_ext --inplace  # tests and benchmarks import from the tree
	rm -rf build *.egg-info
	touch $@

# The list of sources, rewritten only when it changed: a file that went away is noticed too.
$(STAMPS)/files: FORCE | $(STAMPS)/dependencies
	@printf '%s\n' $(PACKAGE_FILES) | cmp --quiet - $@ || printf '%s\n' $(PACKAGE_FILES) > $@

$(REFERENCE): | $(STAMPS)/dependencies
	rm -rf $@.part
	$(PIP) install --quiet --no-deps --target $@.part $(REFERENCE_PINS)
	mv $@.part $@
