# Everything runs in its own virtual environment, made on first use; nothing needs to be installed by hand.
#   PYTHON  the interpreter to make it with (3.10 or later)
#   VENV    its folder
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test bench bench-catalog compare report families gpu-code cuda-build docs lint format clean
.DELETE_ON_ERROR:

help:  ## show this list
	@sed -n 's/^\([a-z%-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## train, index and search MovieLens-100K; results in demo-output/
	$(BIN)/dgi demo --output demo-output

test: $(INSTALLED)  ## run the tests, several files at once
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

BENCHMARKS := $(patsubst bench/bench_%.py,%,$(wildcard bench/bench_*.py))

bench: $(BENCHMARKS:%=bench-%)  ## run the benchmarks on this CPU; figures go to bench/results/ (STATIC_SRC=… adds a peer)

bench-%: $(INSTALLED)  ## run one of them: bench-cosine, bench-gumbel, bench-trie, …
	$(BIN)/python bench/bench_$*.py --json bench/results/cpu-$*.json

bench-metrics: $(INSTALLED)  ## residual quantization by each metric
	$(BIN)/python bench/bench_quantize.py --metrics --json bench/results/cpu-metrics.json

bench-catalog: $(INSTALLED)  ## assign codes to 10 million items, which takes minutes
	$(BIN)/python bench/bench_quantize.py --catalog 10000000 --json bench/results/cpu-catalog.json

compare: $(INSTALLED)  ## compare a benchmark with main, in turns: make compare OP=cosine [BASE=main] [OPTIONS='-- --quick']
	$(BIN)/python bench/compare.py $(OP) --base $(or $(BASE),main) $(OPTIONS)

report: $(INSTALLED)  ## put the figures of bench/results/ into README.md and docs/
	$(BIN)/python bench/report.py

families: $(INSTALLED)  ## compare constrained_generate with generate in every family of transformers; writes docs/families.md
	$(BIN)/python bench/families.py --json bench/families.json --page docs/families.md

gpu-code: $(INSTALLED)  ## compile all GPU kernels for GPUs that need not be here; show registers and spills
	$(BIN)/python bench/gpu_code.py $(OPTIONS)

cuda-build:  ## build the CUDA wheel and check it in clean environments (16 GB; needs nvcc, no GPU)
	PYTHON=$(PYTHON) .ci/cuda-build

docs: $(INSTALLED)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

CPP_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu')

lint: $(INSTALLED)  ## check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format the Python, C++ and CUDA code
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:  ## remove the virtual environment and all that was built
	rm -rf $(VENV) build dist site *.egg-info dgi_kernels/_C*.so demo-output .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without build isolation the extension is built against the torch of the environment itself, with its ninja.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch ninja setuptools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[test,lint]'
	touch $@
