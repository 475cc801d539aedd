# Every target sets up what it needs: a machine with Python 3.11 or newer is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo check test bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv and install the package with its tools

demo: setup  ## distil a student offline on generated scenes and write a report
	$(BIN)/pcd-ray demo

check: setup  ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pcd_ray
	$(BIN)/lint-imports

test: setup  ## all tests; those that need a GPU or the shared photographs skip without
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: setup  ## time and memory of the loss in its three forms
	$(BIN)/python tests/benchmarks/bench_loss.py

clean:  ## remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; \
		exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# compat: by path, so that the package is found also from the folder that holds its clone
	$(BIN)/python -m pip install -q -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	@touch $@
