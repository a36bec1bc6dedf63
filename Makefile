# Start with `make demo` and `make test`. Each creates the virtual environment if it is missing.
PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
EXPORT := .venv-export
EDGE := .venv-edge
DOCS := .venv-docs
PIP_FLAGS := --disable-pip-version-check --quiet
# Caches compiled programs between runs: the second `make test` is several times faster. Scripts started by hand use the
# user's cache folder (experiments/_programs.py); this one is removed by `make clean`.
export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
# Caches small programs too: the tests compile thousands of them.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0

.PHONY: help demo test test-slow test-all notebooks lint format parity exports docs bench bench-quick bench-check clean

help:
	@echo "make demo         train, evaluate and draw a small Mask R-CNN on synthetic images (about 4 minutes on two cores)"
	@echo "make test         run the tests"
	@echo "make test-slow    run the tests that take five seconds to a minute each, which make test leaves out"
	@echo "make test-all     run all tests, also those that take minutes each, and write the fault table in docs/benchmarks/reliability.md"
	@echo "make notebooks    run the notebooks from top to bottom (about three minutes)"
	@echo "make lint         check style and types"
	@echo "make format       fix style"
	@echo "make parity       compare with torchvision, in a separate environment (5 GB)"
	@echo "make exports      run the export tests with the extras onnx and edge, in separate environments"
	@echo "make docs         build the documentation site in .cache/site, in a separate environment"
	@echo "make bench        measure beside torchvision, if make parity was run, and write the benchmark pages"
	@echo "make bench-quick  the same at small sizes, in two minutes"
	@echo "make bench-check  fail if a ratio to torchvision fell by more than 20 % from the committed one"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev,plot,notebook,browser]'
	touch $@

$(PARITY)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install $(PIP_FLAGS) torch==2.12.1 torchvision==0.27.1 timm==1.0.31 transformers==5.24.0 'rfdetr[train]==1.11.2'
	$(PARITY)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev,onnx]'
	touch $@

$(EXPORT)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EXPORT)
	$(EXPORT)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev,onnx]'
	touch $@

# Without the constraints: litert-converter requires an older typing_extensions.
$(EDGE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(EDGE)
	$(EDGE)/bin/python -m pip install $(PIP_FLAGS) --editable '.[dev,edge]'
	touch $@

# ruff formats the signatures on the API pages.
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[docs]' ruff
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/python experiments/quickstart.py

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest

test-slow: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m "slow and not long"

test-all: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m "long or not long" --tally=docs/benchmarks/reliability.md
	$(VENV)/bin/python experiments/benchmark.py --render

notebooks: $(VENV)/.installed
	$(VENV)/bin/python experiments/run_notebooks.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# The originals warn, and their modules are imported for their tests alone; so none of the options of `make test` holds.
parity: $(PARITY)/.installed
	$(PARITY)/bin/python -m pytest tests/parity -s -p no:cacheprovider \
	  --override-ini norecursedirs= --override-ini addopts= --override-ini filterwarnings=

exports: $(EXPORT)/.installed $(EDGE)/.installed
	$(EXPORT)/bin/python -m pytest tests/export -m "long or not long"
	$(EDGE)/bin/python -m pytest tests/export -k tflite

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

BENCHMARK = $(VENV)/bin/python experiments/benchmark.py $(addprefix --peer-python ,$(wildcard $(PARITY)/bin/python))

bench: $(VENV)/.installed
	$(BENCHMARK)

bench-quick: $(VENV)/.installed
	$(BENCHMARK) --quick

bench-check: $(VENV)/.installed
	$(BENCHMARK) --check

clean:
	rm -rf $(VENV) $(PARITY) $(EXPORT) $(EDGE) $(DOCS) .cache .pytest_cache .ruff_cache runs
