# Tasks of this repository; `make help` lists them. Everything lands in .venv and out/.
PYTHON ?= python3
# Stated first and alone: a range would let pip move to a newer build, gigabytes of CUDA packages included.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench reproduce clean

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## set up, then write a clip of a sentence to out/demo.gif, .mp4 and .png
	$(BIN)/latent-shift generate "a red circle moving right" --seed 0 --output out/demo

test: $(VENV)/.tests-installed  ## set up, then run every test (no GPU needed)
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.tests-installed  ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*' 'tests/host/*.cpp' 'tests/host/*.cu' 'tests/host/*.h')
	$(BIN)/mypy

format: $(VENV)/.tests-installed  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*' 'tests/host/*.cpp' 'tests/host/*.cu' 'tests/host/*.h')

bench: $(VENV)/.tests-installed  ## the operators against torch.roll on this machine
	$(BIN)/python benchmarks/bench_shift.py

reproduce: $(VENV)/.tests-installed  ## every way to make clips, trained from one image model (hours; resumes)
	$(BIN)/python -m latent_shift.training.reproduce --output runs/reproduce
	$(BIN)/python -m latent_shift.training.reproduce --output runs/reproduce --report out/reproduction

clean:  ## remove everything that make built
	rm -rf $(VENV) build dist out *.egg-info latent_shift_kernels/*.so latent_shift_kernels/_build.json

# One marker per kind of environment: a second run finds it and starts at once.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)" "setuptools>=77" wheel ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.tests-installed: $(VENV)/.torch $(SOURCES)
	$(INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/.installed
