# make demo   train and compare four small models on real images, then open the report it names
# make test   lint, types and every test
#
# Both make .venv if it is missing and install the tested set of packages; the second run installs nothing.
# PYTHON=python3.12 picks the interpreter, TORCH_FLAGS='--index-url https://...' the build of torch, JOBS=4 the test processes.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types pytest install clean

PYTHON ?= python3
TORCH_FLAGS ?=
JOBS ?= auto
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PLUGINS := $(sort $(dir $(wildcard plugins/*/pyproject.toml)))
INPUTS := pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/.installed
	@$(BIN)/zoo demo

test: lint types pytest

lint: $(VENV)/.installed-test
	@echo "== lint and format"
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format --check -q . || { echo "run '$(BIN)/ruff format .' to format these files"; exit 1; }

types: $(VENV)/.installed-test
	@echo "== types"
	@$(BIN)/mypy zoo $(foreach plugin,$(PLUGINS),$(wildcard $(plugin)zoo_*))

# One thread a process: two processes of one thread beat one of two, since most of the tests are many small operations.
pytest: $(VENV)/.installed-test
	@echo "== tests"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	    $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal tests $(wildcard $(addsuffix tests,$(PLUGINS)))

install: $(VENV)/.installed-test

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	    echo "zoo needs Python 3.11, 3.12 or 3.13 and '$(PYTHON)' is none: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and alone: an installed build of the pinned version is kept by all that follows, CPU or CUDA.
$(VENV)/.torch-$(TORCH): | $(VENV)/.created
	@echo "== installing torch $(TORCH) (the largest download)"
	@$(PIP) $(TORCH_FLAGS) torch==$(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.torch-$(TORCH)
	@echo "== installing zoo"
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(VENV)/.torch-$(TORCH)
	@echo "== installing zoo, its test tools and $(words $(PLUGINS)) plugin(s)"
	@$(PIP) -c constraints.txt -e '.[test]' $(foreach plugin,$(PLUGINS),-e $(plugin))
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find zoo tests plugins -name __pycache__ -type d -prune -exec rm -rf {} +
