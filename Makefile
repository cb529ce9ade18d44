# Needs python3 (3.11 or newer, with venv), make and a C++ compiler (DeepSpeed builds a small part of itself when first used).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types browser slurm soak gpu golden clean

demo: .venv/installed  ## install, train tiny-lm, and let it write
	$(BIN)/bigtrain train tiny-lm
	$(BIN)/bigtrain generate tiny-lm "def "

test: .venv/installed-dev  ## every test that needs neither a GPU nor Slurm
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slurm and not browser and not timed"
	$(BIN)/python -m pytest -m timed

check: lint types test browser slurm  ## what CI runs

browser: .venv/installed-dev  ## the page of `bigtrain compare` in a real Chromium (Debian; as root)
	command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; }
	$(BIN)/python -m pytest -m browser

slurm: .venv/installed-dev  ## the Slurm script on a real two-node Slurm on this machine (Debian; as root)
	command -v slurmctld slurmd >/dev/null || { apt-get update -q && apt-get install -y -q slurmctld slurmd slurm-client; }
	$(BIN)/python -m pytest -m slurm

soak: .venv/installed-dev  ## ten minutes of random kills; the curve must be the undisturbed one
	$(BIN)/python benchmarks/soak.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x launch/*.sh slurm/*.sbatch .ci/run

types: .venv/installed-dev
	$(BIN)/mypy bigtrain

golden: .venv/installed-dev  ## write down the numbers of runs that tests/test_golden.py compares with
	$(BIN)/python tests/test_golden.py

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
