# make demo   train the demo model on 2 processes
# make test   lint, types and every test
# make lint   ruff and mypy only
# make docs   the pages that are printed from the code, then the site, into site/
# All of them first build one environment, .venv.

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
BIN    := $(VENV)/bin

PACKAGES := runtime collectives placement kernels launch benchmarks

# Numba drops what it compiled when the function's own file changes, and not when one does that it calls.
COMPILED := $(shell grep -rl --include=*.py '^from numba' $(PACKAGES))
CURRENT  := $(VENV)/.compiled

.PHONY: demo test lint docs clean

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,test]'
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/moesaic
	touch $@

$(CURRENT): $(READY) $(COMPILED)
	find $(PACKAGES) -name '*.nb[ic]' -delete
	touch $@

demo: $(CURRENT)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m moesaic.launch.train

test: lint
	$(BIN)/python -m pytest

lint: $(CURRENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/src $(BIN)/mypy $(PACKAGES:%=-p moesaic.%)

docs: $(CURRENT)
	$(BIN)/python -m docs.tools.pages
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis runs site
