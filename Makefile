# `make demo` and `make test` install everything they need into .venv (Python 3.11 or newer).
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed

.PHONY: help install demo lint test test-all faults arsenal bench clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedtrust needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

install: $(STAMP)  ## make .venv and install the project with one pip command

demo: $(STAMP)  ## play scenarios/quickstart.toml: two attacks, three server rules, a report
	$(BIN)/fedtrust run scenarios/quickstart.toml

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP)  ## the tests (five to twelve minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(STAMP)  ## the slow tests as well
	$(BIN)/python -m pytest -m "not gpu"

faults: $(STAMP)  ## provoke every fault of tests/faults, the slow ones too, and write docs/faults.md
	FEDTRUST_WRITE_FAULTS=1 $(BIN)/python -m pytest -m "not gpu" tests/faults

arsenal: $(STAMP)  ## write docs/arsenal.md from the registry
	FEDTRUST_WRITE_ARSENAL=1 $(BIN)/python -m pytest tests/test_arsenal.py

bench: $(STAMP)  ## seconds a round beside Flower's own engine and a plain loop (options: BENCH="--clients 40 --json FILE")
	$(BIN)/python -m bench $(BENCH)

clean:  ## remove what was built, not what was run
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
