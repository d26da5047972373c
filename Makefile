# `make demo` and `make test` each set up what they need; both are quick the second time.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: venv mmseg demo test soak lint types check

venv: $(READY)

# imagecorruptions carries the photographs of frost and is never imported: without its dependencies, which are many.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps imagecorruptions==1.1.2
	touch $(READY)

# The reference engine of `rcmae segment framework=mmseg`, which nothing else needs; CI tests with it.
mmseg: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-mmseg.lock

demo: venv
	$(BIN)/rcmae demo

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Kills, restarts and bit flips for as long as asked; not part of CI.
MINUTES ?= 30
soak: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes $(MINUTES)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

check: lint types test
