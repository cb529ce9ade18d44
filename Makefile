# Needs python3 (3.11 or newer, with venv), make and a C++ compiler (DeepSpeed builds a small part of itself when first used).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types gpu clean

demo: .venv/installed  ## install, train tiny-lm, and let it write
	$(BIN)/bigtrain train tiny-lm
	$(BIN)/bigtrain generate tiny-lm "def "

test: .venv/installed-dev  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu"

check: lint types test  ## what CI runs

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh slurm/*.sbatch .ci/run

types: .venv/installed-dev
	$(BIN)/mypy bigtrain

gpu: .venv/installed-dev  ## the engines on CUDA; prints a table of losses and peak memory
	$(BIN)/python -m pytest -m gpu -s

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
