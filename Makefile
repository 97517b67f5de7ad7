# make demo   train the demo model on 2 processes
# make test   lint, types and every test
# make lint   ruff and mypy only
# make docs   the pages that are printed from the code, then the site, into site/
# All of them first build one environment, .venv.

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
BIN    := $(VENV)/bin

PACKAGES := jit runtime collectives placement kernels launch integrations benchmarks

.PHONY: demo test lint warm docs clean

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,test]'
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/moesaic
	touch $@

demo: warm
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m moesaic.launch.train

# Lint takes one core and so does compiling; then each of two workers takes a file of tests at a time, in the order of tests/conftest.py.
# Idle OpenMP threads spin: two workers of two threads each would take the cores from each other.
test: $(READY)
	$(MAKE) --jobs 2 lint warm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/src $(BIN)/mypy $(PACKAGES:%=-p moesaic.%)

# What a run compiles, ahead of it.
warm: $(READY)
	$(BIN)/moesaic doctor --warm

docs: $(READY)
	$(BIN)/python -m docs.tools.pages
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis runs site
