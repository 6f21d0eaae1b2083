# `make serve` and `make test` do all the set-up there is; both rest on `make install`.
PYTHON ?= python3
# Installed first where torch is missing, so that no dependency pulls a build of its own choosing.
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
HOST   ?= 127.0.0.1
PORT   ?= 8000
ARGS   ?=

.PHONY: install serve test test-slow gpu-check lint examples clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

serve: install
	$(BIN)/polypeft-serve --host $(HOST) --port $(PORT) --preload examples $(ARGS)

# A process a core, four at most: each holds models of its own.
test: install
	$(BIN)/pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: install
	$(BIN)/pytest -q -m slow

# What needs a GPU, tests and measurements, with a report; exit status 2 where there is none.
gpu-check: install
	$(BIN)/python -m loadtests.gpu_check $(ARGS)

# The example adapters, trained anew: make examples DATA=folder/of/the/data/sets (minutes each).
examples: install
	examples/train.sh $(DATA)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
