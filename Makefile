# Two commands for a fresh machine: `make demo` and `make test`. They need make, and Python 3.11 or newer with venv.
# Override on the command line: PYTHON=python3.12 picks the interpreter, TORCH="..." the torch build.

TORCH ?= "torch>=2.14,<2.15" "torchvision>=0.29,<0.30"
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install

.PHONY: help demo test test-slow readme lint format clean

help:
	@echo "make demo       set up .venv, answer 'the red cup' on a picture, write outputs/demo.png"
	@echo "make test       set up what the tests need, run them offline"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make readme     run the README's own commands"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff lay out the code"
	@echo "make clean      remove .venv, caches and outputs"

demo: .venv/.core
	@mkdir -p outputs
	$(BIN)/python tools/refer.py groma/assets/tabletop/table.jpg "the red cup" --output outputs/demo.png

test: .venv/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: .venv/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

readme: .venv/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow tests/test_house.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv outputs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find groma tools projects tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps below make the second run quick; a change of pyproject.toml installs anew.

.venv/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "Groma needs Python 3.11 or newer, and found: $$(python3 --version 2>&1 || true)." >&2; \
		echo "Install one, or name it: make demo PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@echo "Making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }

.venv/.core: pyproject.toml setup.py | .venv/bin/python
	@echo "Installing groma: the first time brings torch, some gigabytes and a few minutes"
	$(PIP) $(if $(CI),--quiet) $(TORCH)
	$(PIP) --quiet --editable .
	@touch $@

.venv/.test: .venv/.core
	$(PIP) --quiet --editable ".[test]"
	@touch $@

.venv/.dev: .venv/.core
	$(PIP) --quiet --editable ".[dev]"
	@touch $@
