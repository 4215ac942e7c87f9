# Two commands set everything up on a machine with Python and make: `make demo` and `make test`.
#
# TORCH is the torch requirement. It is installed first, so that a build for your hardware is taken and kept:
#   make test TORCH="torch==2.13.0"
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs install clean

demo: install
	$(BIN)/lynx demo --plot

# pytest is called by its script, not with `python -m`: the tests must find the installed wheel, not the checkout.
test: install
	$(BIN)/pytest

lint: install
	$(BIN)/pip install --quiet --group lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/pip install --quiet --group docs
	$(BIN)/mkdocs build --strict

# The wheel is built and installed anew each time: what is tested is what would be published.
install: $(VENV)/.ready
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/pip install --quiet --force-reinstall --no-deps dist/lynx_moe-*.whl
	$(BIN)/pip check

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet ".[plot,testing]" --group test
	touch $@

clean:
	rm -rf $(VENV) build dist site
