# make quickstart | test | test-all | lint | bench | gpu. Everything runs in a local virtual environment built from constraints.txt.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help install quickstart check test test-all lint format bench gpu clean

help:
	@echo "make quickstart   the whole pipeline on this machine, from synthetic scenes to a report (about 10 minutes)"
	@echo "make check        style, types and the tests of what you changed since origin/main (BASE=COMMIT: since that)"
	@echo "make test         the test suite (CPU, no network)"
	@echo "make test-all     the same with the longer checks"
	@echo "make lint         style and types"
	@echo "make bench        benchmarks against ceilings and baselines"
	@echo "make gpu          the acceptance of a machine with a GPU: parity, speed, memory (under 10 minutes)"

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dpt needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]' 2> >(grep -v 'is neither a file nor a directory' >&2)
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/python launchers/quickstart.py

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" -n 2 --dist loadfile $$($(BIN)/python tests/changed.py $(BASE))

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf runs mlflow.db .pytest_cache .mypy_cache .ruff_cache
