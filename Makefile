# Everything a user or developer starts by hand. `make help` lists it.
# Needs Python 3.10-3.13 and a C++ compiler; everything else goes into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := dev,mpi,export,web,fast
JOBS   ?= 2

# A virtual environment of $(PYTHON) in folder $(1). Without internet: PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make setup
define create_environment
@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
  { echo "error: $(PYTHON) is not Python 3.10-3.13; run make PYTHON=python3.12, say" >&2; exit 2; }
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || \
  { echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; \
    rm -rf $(1); exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help setup wheels quickstart test slurm lint benchmark benchmark-gpu soak format clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv with the pinned dependencies

$(STAMP): setup.py constraints.txt
	$(call create_environment,$(VENV))
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $(STAMP)

# pip wheel, not pip download: what has no wheel on PyPI is built here, and the cluster builds nothing.
wheels: ## all that setup installs, as files in wheels/, for machines without internet (docs/clusters.md)
	@rm -rf wheels/.venv
	$(call create_environment,wheels/.venv)
	DS_BUILD_OPS=0 wheels/.venv/bin/python -m pip wheel --disable-pip-version-check --wheel-dir wheels \
	  --constraint constraints.txt '.[$(EXTRAS)]' setuptools
	@rm -rf wheels/.venv wheels/megagpt-*.whl build

quickstart: setup ## from Python's own text to samples of a small GPT, in a few minutes
	@$(BIN)/python -m tools.quickstart

test: setup ## the whole test suite, JOBS=2 files at a time; what needs a GPU is skipped where there is none
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# policy-rc.d keeps the packages from starting their daemons.
slurm: ## Debian's Slurm, for the tests of slurm/; as root
	@which slurmctld slurmd sbatch munged ip >/dev/null || { \
	  test $$(id -u) = 0 || { echo "error: only root can install packages; run make slurm as root" >&2; exit 2; }; \
	  policy=/usr/sbin/policy-rc.d; \
	  test -e $$policy || { trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; }; \
	  apt-get -q -o DPkg::Lock::Timeout=300 update && DEBIAN_FRONTEND=noninteractive apt-get -q \
	    -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends slurmd slurmctld slurm-client munge iproute2; }

lint: setup ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: setup ## a training step side by side with a plain torch loop
	@$(BIN)/python -m tools.benchmark train configs/small.yaml

GPU_RESULTS ?= runs/benchmark
benchmark-gpu: setup ## on a GPU: its tests, then every measurement of docs/performance.md that needs one
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python -m tools.benchmark all --output $(GPU_RESULTS)

soak: setup ## preprocessing under 40 kills; half an hour of training under kills, hangs and changing ranks
	@$(BIN)/python -m pytest tests/distributed/test_preprocess_faults.py -k random_moments --kills 40
	@$(BIN)/python -m tests.distributed.soak

format: setup ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; data/, runs/ and wheels/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
