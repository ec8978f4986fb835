# Every target sets itself up: it makes .venv and installs what constraints.txt pins.
PYTHON ?= python3
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The processes share the cores, so each of them uses one; the suite is the same with and
# without a GPU, whose tests `make gpu` runs.
CPU := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

.PHONY: help check test slow demo gpu clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

check: $(VENV)/.dev ## lint, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.dev ## the test suite, on the CPU
	$(CPU) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal --timeout 120

slow: $(VENV)/.dev ## the longer studies that `make test` leaves out
	$(CPU) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 -m slow --timeout 1800

demo: $(VENV)/.examples ## the quickstart
	$(BIN)/python examples/quickstart.py

gpu: ## GPU tests and benchmarks, with the python that is there
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

clean: ## remove the environment, caches and run folders
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -rf lightning_logs wandb runs .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,examples,wandb,deepspeed,bnb]'
	@touch $@

$(VENV)/.examples: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[examples]'
	@touch $@
