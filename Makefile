# make demo | make test | make env | make lint | make clean
.DELETE_ON_ERROR:
SHELL := /bin/bash
PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || echo 2)
LOCK := envs/requirements.lock
WITH := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: demo status test test-golden quick bench env lint format docs clean

## the embedded experiment, from nothing to results/table.csv
demo: env
	@$(WITH) snakemake --cores $(CORES) results/table.csv
	@echo && cat results/table.md

## what is done, at work, stopped and waiting; `.venv/bin/python -m kdbench.status --watch` tells it again and again
status: env
	@$(WITH) python -m kdbench.status

## the environment in .venv; made anew when the lock file changes
env:
	@cmp -s $(LOCK) .venv/made-from.lock || $(MAKE) --no-print-directory new-env

.PHONY: new-env
new-env:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement $(LOCK)
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	cp $(LOCK) .venv/made-from.lock

## lint, formatting, the whole test suite; the long tests of whole workflows begin first, each file in one of two processes
test: lint
	$(WITH) python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20

## the tests that take seconds
quick: env
	$(WITH) python -m pytest -n 2 --dist loadfile -m "not slow"

## the golden numbers alone, and how many cases of each group; KDBENCH_GOLDEN=DIR takes those of another folder
test-golden: env
	$(WITH) python -m pytest tests/golden -n 2 --dist loadfile -rf --every-case

lint: env
	$(WITH) ruff check .
	$(WITH) ruff format --check .
	$(WITH) snakefmt --check Snakefile rules workflow/Snakefile
	$(WITH) snakemake --lint

## time and memory of every method's step: benchmarks/results/bench.md; up to 15 minutes; fails where a ceiling is missed
bench: env
	$(WITH) python -m benchmarks.bench

## rewrite code in the project's format
format: env
	$(WITH) ruff check --fix .
	$(WITH) ruff format .
	$(WITH) snakefmt Snakefile rules workflow/Snakefile

clean:
	rm -rf .venv .snakemake logs results/* resources/*

## config/README.md from the settings classes
docs: env
	.venv/bin/python -m kdbench.reference > config/README.md
