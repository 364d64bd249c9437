# Every target that people type carries a description after `##`; `make help` prints them.

PYTHON ?= python3
VENV ?= .venv
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vaepp
TINY := $(CACHE)/tiny-z-image
BIN := $(VENV)/bin
# 2 runs two test files at a time, one on each core; 0 runs one after the other.
PYTEST_JOBS ?= 0
PYTEST_ARGS ?=
FAULTS_ARGS ?=

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format docs bench faults kills starts fuzz soak clean

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.12] [VENV=.venv]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## create .venv and install vaepp with its development tools
	@$(PYTHON) scripts/setup_env.py $(VENV)

demo: install ## make pictures with a small Z-Image checkpoint on 2 ranks; needs no GPU
	@echo "a small, untrained Z-Image checkpoint is in:"
	@TQDM_DISABLE=1 $(BIN)/python -m vaepp_plugins.tiny_z_image "$(TINY)"
	@echo "2 ranks run examples/quickstart.toml with it:"
	@$(BIN)/vaepp-run examples/quickstart.toml --set "model.id=$(TINY)"
	@echo "The pictures are in examples/out. They are patterns: the small checkpoint is untrained."

test: install ## everything CI checks: lint, types, tests on real gloo ranks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -n $(PYTEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: install ## ruff and mypy, without the tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: install ## rewrite the sources as ruff wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: install ## check the documentation: links, snippets, every hook and setting in place
	@$(BIN)/python -m pytest tests/test_docs.py $(PYTEST_ARGS)

bench: install ## time, bytes and memory of each strategy against one rank, on this CPU
	@$(BIN)/python -m benchmarks.run

faults: install ## inject every fault into every stage of real runs; prints what was named and what was left
	@TQDM_DISABLE=1 $(BIN)/python -m benchmarks.faults $(FAULTS_ARGS)

kills: install ## kill a random process of real runs at random moments; prints what was named and what was left
	@TQDM_DISABLE=1 $(BIN)/python -m benchmarks.random_kills

starts: install ## let ranks start and torchrun go wrong; prints what was named and what was left
	@TQDM_DISABLE=1 $(BIN)/python -m benchmarks.starts

fuzz: install ## try 10,000 random specs, and as many with one wrong type
	@VAEPP_FUZZ=20000 $(BIN)/python -m pytest -q tests/spec/test_spec_fuzz.py tests/spec/test_spec_hostile.py

soak: install ## serve 200 requests of mixed sizes with one pool; shows that nothing grows
	@TQDM_DISABLE=1 $(BIN)/python -m benchmarks.soak

clean: ## remove caches and build leftovers; keeps .venv
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis ./*.egg-info
