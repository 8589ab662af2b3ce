# make quickstart   create .venv and run the quickstart on the CPU
# make test         create .venv and run the checks and the fast tests
# make test-core    run the fast tests of the core in a copy without the other packages (minutes)
# make test-slow    build the documentation, run the slow tests: browser, processes, faults
# make test-fuzz    fuzz importers, folders and the request parser (20 minutes)
# make test-faults  inject faults at every known point instead of a sample (minutes)
# make test-pretraining   test the training of finesight-tiny from scratch (2 minutes)
# make test-docs    run all commands of the documentation and compare their output (minutes)
# make measures     print the code and language measures
# make docs         build the documentation in English and Chinese: build/docs/en/index.html

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Tests use small tensors: one thread is faster than several. Each process uses up to 4 GB.
# Bytecode is cached even where containers disable it: tests start hundreds of Python processes.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest
# Failed tests that pass alone are printed as flaky, except for tests of a guarantee.
REPEATING_PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python tools/run_slow_tests.py
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: quickstart test test-core slow test-slow test-fuzz test-faults test-pretraining test-docs lint types layers unit measures docs clean

quickstart: $(VENV)/.installed
	$(BIN)/finesight quickstart --out quickstart

# The static checks use one core each; the tests start beside the longest of them.
test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory --jobs 2 types lint layers unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/oxfmt --check 'src/**/*.{css,js,yaml}'
	$(BIN)/djangofmt --check src
	$(BIN)/python tools/house.py

types: $(VENV)/.installed-dev
	$(BIN)/mypy

layers: $(VENV)/.installed-dev
	$(BIN)/lint-imports

measures: $(VENV)/.installed-dev
	$(BIN)/python tools/house.py

unit: $(VENV)/.installed-dev
	$(PYTEST) $(PARALLEL) -m "not slow and not fuzz"

test-core: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python tools/core_copy.py $(PARALLEL)

# Sphinx uses one core, and most slow tests wait for other processes.
test-slow: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory --jobs 2 docs slow

slow: $(VENV)/.installed-dev
	$(REPEATING_PYTEST) $(PARALLEL) -m slow

test-fuzz: $(VENV)/.installed-dev
	$(PYTEST) -m fuzz

test-pretraining: $(VENV)/.installed-dev
	$(PYTEST) $(PARALLEL) pretraining/tests

# Run the code blocks of the documentation; takes minutes.
test-docs: $(VENV)/.installed-dev
	$(PYTEST) tests/docs --type-blocks

test-faults: $(VENV)/.installed-dev
	$(PYTEST) tests/faults --every-fault

# Builds both languages; warnings are errors.
docs: $(VENV)/.installed-dev
	for language in en zh_CN; do $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going \
	  -c docs -D language=$$language docs/$${language%_*} build/docs/$${language%_*} || exit 1; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

INSTALLED_FILES := pyproject.toml setup.py constraints.txt $(wildcard pretraining/weights/*)

$(VENV)/.installed: $(VENV)/bin/python $(INSTALLED_FILES)
	$(PIP) -e .
	touch $@

# Includes everything of .installed, in one installation.
$(VENV)/.installed-dev: $(VENV)/bin/python $(INSTALLED_FILES)
	$(PIP) -e '.[dev,track]'
	touch $(VENV)/.installed $@
