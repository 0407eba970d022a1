# The two commands on a fresh machine are `make demo` and `make test`; `make help` lists the others.
# Each creates .venv if there is none and installs what it needs; a second call installs nothing.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=            # a Python of your choice; otherwise the first of these that is new enough
PYTHONS := python3.11 python3.12 python3.13 python3
PIP_FLAGS ?=         # given to every pip install, such as an index with CPU wheels of torch
JOBS ?= 0            # test processes; 0 runs the tests in one
DIST := --dist worksteal  # each process has a stretch of the tests: modules share models, servers and clusters
PYTEST_FLAGS ?=
SEARCH_FLAGS ?=
AUDIT ?=

# What is imported is compiled once, and not again in each of the hundred processes that a run of the tests starts: torch
# and transformers are 8 seconds of a core from their source, and 4 from their bytecode.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test test-fast test-faults audit lint format bench bench-search clean help install install-dev

demo: install  ## search SmolLM2-135M for this machine and show the frontier
	$(BIN)/autoq search demo

test: lint  ## lint, then all tests with branch coverage and its floor
	$(BIN)/python -m pytest -n $(JOBS) $(DIST) --cov --cov-report=term --cov-fail-under=85 $(PYTEST_FLAGS)

test-fast: install-dev  ## the tests that need no real model and few processes
	$(BIN)/python -m pytest -n $(JOBS) $(DIST) -m "not slow" $(PYTEST_FLAGS)

test-faults: install-dev  ## kill, cut, fill and corrupt for hours; `make test` holds a short form of each
	AUTOQ_FAULTS=long $(BIN)/python -m pytest -n $(JOBS) tests/faults --timeout 14400 $(PYTEST_FLAGS)

audit: install-dev  ## known vulnerabilities of the pinned versions (AUDIT=--ci: blame only who pinned them)
	$(BIN)/python .ci/audit.py $(AUDIT)

lint: install-dev  ## ruff, its formatter, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev  ## rewrite the code as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

LONG := benchmarks/search.py benchmarks/early_stopping.py benchmarks/simulation.py  # a quarter of an hour to hours each

bench: install-dev  ## print the tables of the README that take minutes
	@set -e; for script in $(filter-out $(LONG),$(wildcard benchmarks/[a-z]*.py)); do echo "# $$script"; $(BIN)/python $$script; done

bench-search: install-dev  ## all samplers side by side on one evaluator (hours; SEARCH_FLAGS='--long --out FILE')
	$(BIN)/python benchmarks/search.py $(SEARCH_FLAGS)

clean:  ## remove the environment and everything that is built; databases stay
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find autoq workers studies dashboards tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A stamp is written last, so an interrupted install leaves none and is taken up again.
install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# transformers imports hqq wherever it finds it, and with it torch's compiler: seconds in every process of a test. So the
# package stands aside, where only the test finds it that compares with it.
REFERENCE := hqq termcolor

# What tests need holds what a user needs: after the larger install the smaller one has nothing to do.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile $(PIP_FLAGS) -c constraints.txt --no-deps --upgrade --target $(VENV)/reference $(REFERENCE)
	touch $(VENV)/.installed $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[gguf,serve,client]'
	touch $@

# Asks for ensurepip too: where a system splits it off, `venv` would only fail halfway.
FITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

$(VENV)/.created:
	@if ! $(BIN)/python -c 'import pip; $(FITS)' 2>/dev/null; then \
	  found=; \
	  for python in $(PYTHON) $(if $(strip $(PYTHON)),,$(PYTHONS)); do \
	    if $$python -c '$(FITS)' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "AutoQ needs Python 3.11 or newer with venv (on Debian: apt-get install python3-venv);" \
	      "tried $(or $(strip $(PYTHON)),$(PYTHONS)); name another with make PYTHON=..." >&2; \
	    exit 1; \
	  fi; \
	  echo "creating $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV); \
	fi
	@touch $@
