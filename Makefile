PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test models fuzz lint docs clean

demo: $(VENV)/.installed
	$(BIN)/fairtrial compare digits \
		optimizer=AdamW,AdamP,FRUGAL \
		loss=CrossEntropyLoss,ZLoss \
		batch=NoTransform,DecoupledMixup --seeds 14

test: $(VENV)/.installed-dev lint
	-$(BIN)/fairtrial models --all
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

models: $(VENV)/.installed-dev
	$(BIN)/fairtrial models --all

fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(or $(EXAMPLES),10000) $(BIN)/pytest -n 2 -m fuzz

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) site
