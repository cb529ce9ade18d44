# Needs python3 (3.11 or newer, with venv) and make; the tests also need a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types size docs reference golden faults trained course browser slurm soak bench gpu clean

demo: .venv/installed  ## install, train tiny-lm, and let it write
	$(BIN)/bigtrain train tiny-lm
	$(BIN)/bigtrain generate tiny-lm "def "

test: .venv/installed-dev  ## training: every test that needs neither a GPU, Slurm nor a browser
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slurm and not browser and not timed and not course and not trained"
	$(BIN)/python -m pytest -m timed

check: lint types size docs test trained course faults browser slurm  ## what CI runs

trained: .venv/installed-dev  ## what is done with a trained model, and with tables and translations
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "trained and not browser"

course: .venv/installed-dev  ## every command of docs/course.md, shortened: three minutes
	$(BIN)/python -m pytest -m course

faults: .venv/installed-dev  ## the main faults once more, without the tests' fork server
	BIGTRAIN_PLAIN_PROCESSES=1 $(BIN)/python -m pytest -m plain

browser: .venv/installed-dev  ## the page of `bigtrain compare` in a real Chromium (Debian; as root)
	command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; }
	$(BIN)/python -m pytest -m browser

slurm: .venv/installed-dev  ## the Slurm script on a real two-node Slurm on this machine (Debian; as root)
	command -v slurmctld slurmd >/dev/null || { apt-get update -q && apt-get install -y -q slurmctld slurmd slurm-client; }
	$(BIN)/python -m pytest -m slurm

soak: .venv/installed-dev  ## ten minutes of random kills; the curve must be the undisturbed one
	$(BIN)/python benchmarks/soak.py

bench: .venv/installed-bench  ## bigtrain beside other toolkits on two idle cores, an hour (BENCH=--quick: a minute)
	$(BIN)/python benchmarks/bench.py $(BENCH)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck -x launch/*.sh slurm/*.sbatch examples/*.sh .ci/run

types: .venv/installed-dev
	$(BIN)/mypy bigtrain

size: .venv/installed-dev  ## lines, tokens and tokens per line of each package; fails above the limits
	$(BIN)/python tools/size.py

docs: .venv/installed-dev  ## the documentation as a site in build/docs; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

reference: .venv/installed-dev  ## docs/recipe.md, from the recipe's schema
	$(BIN)/python tools/recipe_reference.py

golden: .venv/installed-dev  ## write down the numbers of runs that tests/test_golden.py compares with
	$(BIN)/python tests/test_golden.py

gpu: .venv/installed-dev  ## all of CUDA in ten minutes; prints a table and writes benchmarks/gpu.json
	$(BIN)/python -m pytest -m gpu -s

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv/installed-bench: .venv/installed-dev
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf .venv runs
