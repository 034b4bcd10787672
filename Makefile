# Works on a fresh clone with Python 3.11+ and a C++ compiler, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sparseling needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $(STAMP)

# Text to a small reasoning model that answers, with a report to look at: runs/laptop/report.html
demo: setup
	$(BIN)/sparseling run recipes/laptop.yaml

test: setup
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q

# Proofs that take minutes
test-slow: setup
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check sparseling tests
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
