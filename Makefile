# Every target works from a clean clone: the virtual environment is made on first use
# and remade only when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard src tests benchmarks examples)
OLDEST := .venv-oldest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test stress test-gpu test-oldest sanitize bench gpu docs package audit lint format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[recipes,dev]'
	touch $@

quickstart: $(INSTALLED)  ## pre-train a small Llama on CPU (options: make quickstart ARGS="--steps 50")
	$(BIN)/lorapre pretrain $(ARGS)

# One torch thread per worker: two workers with two threads each would fight over two cores.
test: $(INSTALLED)  ## run the tests (options: make test ARGS="-k groups")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# Processes killed at random, damaged files, full disks, mistakes, and gradients drawn anew; a failure prints its example.
stress: $(INSTALLED)  ## the long version of the tests of faults and of odd gradients, in some minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress.py --kills 50 --damages 30 --full-disks 10 --others 12 --mistakes 137 \
		--bad-gradients 6
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest -n 2 tests/test_fuzz.py

test-gpu: $(INSTALLED)  ## run what has kernels of its own on the GPU, if there is one
	@$(BIN)/python -c "import torch; print('on', torch.cuda.get_device_name()) if torch.cuda.is_available() else \
		print('torch sees no GPU: the kernels run in the interpreter of Triton, what needs a GPU is skipped')"
	$(BIN)/python -m pytest -m gpu -rs $(ARGS)

# Extras of pyproject.toml that only one target needs.
$(INSTALLED)-%: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[recipes,dev]'
	touch $@

# What Python and torch never free is no leak of ours. The sanitizers have to be loaded before Python, and compile in
# minutes at -O3.
SANITIZED := env -u LD_PRELOAD sh -c 'exec cc "$$@" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all' cc

sanitize: export CC = $(SANITIZED)
sanitize: $(INSTALLED)  ## run the tests of the C file under the sanitizers of addresses and undefined behaviour
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_backends_c.py $(ARGS)

# Gigabytes: there may be no build of an old torch without CUDA (see constraints-oldest.txt).
test-oldest: $(OLDEST)/.installed  ## run the tests with the oldest dependencies that pyproject.toml allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 $(ARGS)

# Leave the machine alone meanwhile: these are timings.
bench: $(INSTALLED)-bench  ## measure time and memory beside other optimizers, in some minutes
	$(BIN)/python benchmarks/step_time.py --model llama-60m --ranks 16 128
	$(BIN)/python benchmarks/step_time.py --model llama-60m --ranks 16 --dtype bf16
	$(BIN)/python benchmarks/memory.py --model llama-60m --ranks 128
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/report.py

# Installs nothing, for machines without a network: .venv where there is one, or else the Python that has torch and CUDA.
gpu:  ## measure on one NVIDIA GPU, in eight minutes (options: make gpu ARGS=--dry-run)
	PYTHONPATH=src $(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu.py $(ARGS)

# Not --quiet, under which --strict sees no warnings.
docs: $(INSTALLED)-docs  ## build the site in site/; a warning or a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

package: $(INSTALLED)  ## build sdist and wheel in dist/, and try the wheel beside torch alone
	$(BIN)/python .ci/package.py

audit: $(INSTALLED)-audit  ## look the pinned packages up in the database of known vulnerabilities
	$(BIN)/python .ci/audit.py $(ARGS)

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(INSTALLED)  ## apply the style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove the virtual environment, caches and build products (keeps runs/)
	rm -rf $(VENV) $(OLDEST) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
