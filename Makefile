# The two commands to know: `make demo` and `make test`. Both make the environment first, in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test nightly lint docs bench clean help

help:
	@echo "make demo     fit a VAE on handwritten digits: live progress, honest numbers, report.html"
	@echo "make test     the test suite (under 12 minutes on two cores)"
	@echo "make nightly  the slow checks: Inductor on every program, long SIGKILL series"
	@echo "make docs     the documentation, its notebooks executed"
	@echo "make bench    the benchmark tables"
	@echo "make lint     ruff"

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "probgen needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/probgen fit vae --data digits --z_dim 2

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

nightly: $(VENV)/ready
	XLA_FLAGS= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly -n 2 --timeout 3600

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: $(VENV)/ready
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

bench: $(VENV)/ready
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist docs/_build runs *.egg-info
