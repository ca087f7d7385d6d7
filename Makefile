# `make demo` runs the main job; `make test` runs the tests. Each builds .venv first when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
THREADS ?= 1

.PHONY: demo test lint wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   pretrain on photographs and print where the report is (about two minutes)"
	@echo "make test   run the tests with coverage"
	@echo "make lint   ruff, mypy and the layer contracts"
	@echo "make wheel  build dist/*.whl"

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "maskwright needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,export,structured]' --constraint constraints.txt
	touch $@

demo: $(VENV)/ready
	$(BIN)/maskwright pretrain

test: $(VENV)/ready
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --cov --cov-report= $(ARGS)
	$(BIN)/coverage report --fail-under=90 --skip-covered

lint: $(VENV)/ready
	$(BIN)/ruff check core plugins tests benchmarks
	$(BIN)/ruff format --check core plugins tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) dist .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
