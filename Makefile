# The one door. `make` lists the verbs.
SHELL := /bin/bash
.DEFAULT_GOAL := help

.PHONY: help install demo up fleet chaos simulate test test-long check bench format lock clean

PYTHON3 ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The interpreter's real path: a shim would make uv look for a download.
INTERPRETER := $(shell $(PYTHON3) -c 'import os, sys; print(os.path.realpath(sys.executable))')
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never
export HF_HUB_OFFLINE := 1

help: ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Make .venv with the locked packages

$(VENV)/.installed: requirements/all.txt pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11, 3.12 or 3.13 is needed, this is %s" % sys.version.split()[0])'
	@command -v uv >/dev/null || test -x .uv/bin/uv || { \
		echo "Fetching uv into .uv ..."; $(PYTHON3) -m pip install -q --disable-pip-version-check --target .uv uv; }
	@test -x $(BIN)/python || $(UV) venv -q --python $(INTERPRETER) $(VENV)
	@echo "Installing the locked packages into $(VENV) (a minute when nothing is cached) ..."
	@# Compiled once, here: else each process compiles torch anew, seconds long, where Python may not write beside its packages.
	@$(UV) pip sync -q --compile-bytecode --python $(BIN)/python --require-hashes requirements/all.txt
	@$(UV) pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

demo: install ## The whole loop on real handwritten digits, over HTTP, in a few minutes
	@$(BIN)/noisy-student demo

up: install ## Start everything on this machine: API, worker, housekeeping
	@$(BIN)/noisy-student up

fleet: install ## The containers' fleet as processes of this machine, without containers
	@$(BIN)/python -m deploy

chaos: install ## Faults by the minute over real processes, then doctor --verify: SEED=7 MINUTES=10
	@$(BIN)/python -m tests.faults --seed $(or $(SEED),0) --minutes $(or $(MINUTES),10) --report build/chaos

simulate: install ## 30 000 shards, 200 pretended workers, everything else real: SEED=7 SHARDS=30000 WORKERS=200
	@$(BIN)/python -m bench simulate

test: install ## The tests that every change must pass (under 15 minutes on two cores)
	@$(BIN)/python -m pytest -m "not long and not gpu" -n 2 --dist loadfile

test-long: install ## The slow tests: a full disk, compiled training, a whole run with its control; on a GPU, CUDA
	@$(BIN)/python -m pytest -m "long or gpu"

check: install ## Lint, types, import contracts, declared dependencies
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/deptry .

bench: install ## Measure speed and memory as ratios; non-zero when a goal is missed without a breakdown
	@$(BIN)/python -m bench

format: install ## Rewrite the files in the house's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: ## Recompile requirements/*.txt: names, versions and hashes, no addresses
	@UV="$(UV)" bash requirements/lock.sh

clean: ## Remove what was built; never data
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache bench/cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
