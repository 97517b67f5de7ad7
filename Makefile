# make demo   train the demo model on 2 processes
# make test   lint, types and every test
# make lint   ruff and mypy only
# make docs   the pages that are printed from the code, then the site, into site/
# All of them first build one environment, .venv.

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
BIN    := $(VENV)/bin

PACKAGES := jit runtime collectives placement kernels launch benchmarks

.PHONY: demo test lint docs clean

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,test]'
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/moesaic
	$(BIN)/moesaic doctor --warm
	touch $@

demo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m moesaic.launch.train

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/src $(BIN)/mypy $(PACKAGES:%=-p moesaic.%)

docs: $(READY)
	$(BIN)/python -m docs.tools.pages
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis runs site
