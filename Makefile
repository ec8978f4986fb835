# Every target sets itself up: it makes .venv and installs what constraints.txt pins.
PYTHON ?= python3
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The processes share the cores, so each of them uses one; the suite is the same with and
# without a GPU, whose tests `make gpu` runs.
CPU := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

.PHONY: help check docs test slow demo bench gpu dist clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

check: $(VENV)/.dev ## lint, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs ## the documentation, in build/docs; a broken link or docstring is an error
	$(BIN)/python -m sphinx -c docs -a -E -W --keep-going -q . build/docs

test: $(VENV)/.dev ## the test suite, on the CPU
	$(CPU) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal --timeout 120

slow: $(VENV)/.dev ## the longer studies that `make test` leaves out
	$(CPU) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 -m slow --timeout 1800

demo: $(VENV)/.examples ## the quickstart
	$(BIN)/python examples/quickstart.py

bench: $(VENV)/.bench ## ours beside its peers, on two quiet cores; writes the table of README.md
	$(BIN)/python benchmarks/bench.py

gpu: ## GPU tests and benchmarks, with the python that is there
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

dist: ## the wheel and the source archive, tried in an empty environment
	PYTHON=$(PYTHON) .ci/dist

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

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[docs]'
	@touch $@

# Peers without what they depend on: some would bring another torch, or torchvision.
$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,examples,bnb]'
	$(INSTALL) --no-deps gns-pytorch ema-pytorch timm torchao open_clip_torch
	@touch $@
