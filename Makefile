# Two commands do everything from a fresh clone: `make demo` and `make test`. Both make their own .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# a process per core, at most 4, each with a Hub server of its own and whole files of tests; WORKERS=0 runs tests one after another
WORKERS ?= logical
SPREAD := --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile
PYTEST := $(BIN)/python -m pytest $(SPREAD)

.PHONY: help demo test test-slow test-all test-xet test-lowest lint docs docs-serve faults bench fuzz clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: $(VENV)/.installed  ## learn a prior, store it, fine-tune under it: real data, a table and a figure, 4 to 6 minutes on 2 slow cores
	$(BIN)/prior-hub demo --output demo_output

test: $(VENV)/.installed  ## quick tests, 3 to 7 minutes on 2 slow cores
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.installed  ## the tests that `make test` leaves out
	$(PYTEST) -m "slow and not gpu"

test-all: $(VENV)/.installed  ## all tests
	$(PYTEST)

FAKEHUB ?= ../shared/tools/loopback_hub/fakehub.py
test-xet: $(VENV)/.installed  ## the Hub tests against a full Hub server, over Xet (FAKEHUB=path/to/fakehub.py)
	PRIOR_HUB_TEST_FAKEHUB="$(abspath $(FAKEHUB))" $(PYTEST) -m hub

.venv-lowest/.installed: pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) .ci/lowest.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-lowest: .venv-lowest/.installed  ## quick tests with the lower bound of every dependency
	.venv-lowest/bin/python -m pytest $(SPREAD) -m "not slow and not gpu" -W ignore::DeprecationWarning -W ignore::FutureWarning

FUZZ ?= --minutes 10
fuzz: $(VENV)/.installed  ## fuzz the readers and the matcher for 10 minutes (FUZZ="--minutes 60 --target reader --corpus FOLDER")
	$(BIN)/python tests/fuzz/run.py $(FUZZ)

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

faults: $(VENV)/.installed  ## break every kind of request of every operation, table into docs/faults.md, about 5 minutes
	$(BIN)/python tests/faults.py --json docs/faults.json --markdown docs/faults.md

.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > .venv-docs/docs.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv-docs/docs.txt
	@touch $@

docs: .venv-docs/.installed  ## the documentation into build/site: a broken link, anchor or name is an error; needs no torch
	$(PYTHON) docs/check_links.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

docs-serve: .venv-docs/.installed  ## the documentation at http://127.0.0.1:8000, built again when a file changes
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs serve

bench: $(VENV)/.installed  ## benchmarks, figures into benchmarks/RESULTS.md, 35 minutes on 2 slow cores (BENCH_ALL=1: with the long ones)
	$(BIN)/python benchmarks/run_all.py $(BENCH)

clean:  ## remove what the targets above made
	rm -rf $(VENV) .venv-lowest .venv-docs build demo_output example_output .mypy_cache .ruff_cache .pytest_cache .hypothesis
