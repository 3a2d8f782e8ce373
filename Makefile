# make demo    SFT, reward model and PPO on the built-in corpus     RUN_DIR=runs/mine SEED=1 ARGS="--ppo-steps 10"
# make test    every test that this machine can run                 PYTEST_ARGS="-k parity"
# make lint    ruff, formatting, types; make format mends the first two
# make docs    docs/config.md and docs/record.md, from the code
# make images  docs/images, from a recorded run                   RUN_DIR=runs/demo
# make setup   .venv with Pellucid in it; the others call it        PYTHON=python3.12 CONSTRAINT= PIP_ARGS=… VENV_ARGS=…

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# The first interpreter that is new enough; PYTHON=… names another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
CONSTRAINT ?= constraints/cpu.txt
EXTRAS ?= dev
PIP_ARGS ?=
VENV_ARGS ?=

SEED ?= 0
RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
ARGS ?=

# One process a core (4 at most, each loads torch), one thread each: faster than one process with all threads, and the
# same thread count everywhere, which bitwise tests need. Work-stealing keeps the tests of a file, and so its fixtures, on
# one worker as far as it can.
WORKERS ?= auto
PYTEST_ARGS ?=

.PHONY: setup demo test test-fast lint format docs images clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo "make setup: Pellucid needs Python 3.11 or newer, and none was found on the PATH; install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make setup: Pellucid needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make setup: $(PYTHON) cannot make virtual environments (its modules venv and ensurepip are missing); on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV_ARGS) $(VENV)
	@# A torch that is there and new enough stays: the constraint is for an environment that has none.
	@if $(BIN)/python -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13))' 2>/dev/null; \
	then echo "make setup: keeping the PyTorch in $(VENV)"; constraint=""; else constraint="$(CONSTRAINT)"; fi; \
	set -x; $(BIN)/python -m pip install $${constraint:+--constraint $$constraint} $(PIP_ARGS) -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(BIN)/pellucid quickstart --run.dir "$(RUN_DIR)" --run.seed $(SEED) $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal --durations 10 -rs $(PYTEST_ARGS)

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal -rs -m "not slow and not integration and not gpu" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python docs/make_config_md.py
	$(BIN)/python docs/make_record_md.py

images: $(STAMP)
	$(BIN)/python docs/make_images.py "$(RUN_DIR)" $(ARGS)

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
