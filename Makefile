# Every verb sets up what it needs in .venv by itself: Python 3.11 or newer and make are enough.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := "$(BIN)/python" -m pip install --quiet --disable-pip-version-check --editable

.DEFAULT_GOAL := help
.PHONY: help demo quickstart check test docs grid soak lint format clean

help:  ## this list
	@sed -n -E 's/^([a-z]+):.*## */\1 /p' Makefile | while read -r verb text; do \
	  printf '  make %-10s %s\n' "$$verb" "$$text"; done

demo: $(VENV)/.demo  ## a chat model answers in blocks, beside plain decoding
	"$(BIN)/deer-jax" demo

quickstart: $(VENV)/.demo  ## everything, small: text, target, answers, drafter, numbers, export (15 minutes)
	"$(BIN)/deer-jax" pipeline --steps configs/quickstart.yaml --output runs/quickstart

check: lint  ## format, lint and type checks, then one of each exactness test (90 seconds)
	"$(BIN)/python" -m pytest -n $(WORKERS) -m representative

test: lint .cache/libtpu/.stamp  ## format, lint and type checks, then all tests
	"$(BIN)/python" -m pytest -n $(WORKERS)

docs: $(VENV)/.test  ## write docs/api.md from the docstrings and options
	"$(BIN)/python" docs/make_api.py

grid: $(VENV)/.test  ## the exactness grid: speculative against plain decoding over many settings
	"$(BIN)/python" benchmarks/exactness_grid.py

soak: $(VENV)/.test  ## kill -9 every verb at twenty moments; each must end as if it had not been killed (ten minutes)
	DEER_JAX_KILLS=20 "$(BIN)/python" -m pytest -s tests/soak tests/training/test_processes.py \
	  tests/decoding/test_decode_processes.py tests/checkpoints/test_shelves.py

lint: $(VENV)/.test  ## format, lint and type checks
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/pyrefly" check
	"$(BIN)/shellcheck" --external-sources launch/*.sh

format: $(VENV)/.test  ## rewrite the sources in the project's format
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

clean:  ## remove the environment, caches and build folders
	rm -rf "$(VENV)" .cache .pytest_cache .ruff_cache build dist deer_jax.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment whose Python is gone, too old, or was replaced by another version is thrown away, stamps and all. This
# happens while make reads the file: a recipe would come too late, after make has looked at the stamps.
USABLE := import os, sys, sysconfig; \
  sys.exit(sys.version_info < (3, 11) or not os.path.isdir(sysconfig.get_path("purelib")))
IGNORED := $(shell [ ! -e "$(VENV)" ] || "$(BIN)/python" -c '$(USABLE)' 2>/dev/null || rm -rf "$(VENV)")

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "deer_jax needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; exit 2; }

# A stamp says that its packages were installed for this pyproject.toml. The test environment serves the demo as well.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@[ -e $(VENV)/.test ] && [ ! pyproject.toml -nt $(VENV)/.test ] || { \
	  echo "installing deer_jax into $(VENV), a minute or two the first time"; $(PIP_INSTALL) .; }
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing deer_jax and its test tools into $(VENV), a few minutes the first time"
	@$(PIP_INSTALL) '.[test]'
	@touch $@

# Some tests compile programs for TPUs, which needs the libtpu of this jax, beside the environment: in it programs on a
# CPU would look for a TPU first. Where it cannot be had those tests are skipped.
LIBTPU := import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))
.cache/libtpu/.stamp: $(VENV)/.test
	@[ "$$(uname -sm)" != "Linux x86_64" ] || { \
	  echo "installing libtpu into .cache/libtpu, for the tests that compile for TPUs"; \
	  "$(BIN)/python" -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps --upgrade \
	    --target .cache/libtpu "$$("$(BIN)/python" -c '$(LIBTPU)')" && touch $@; \
	} || echo "no libtpu: the tests that compile for TPUs are skipped"
