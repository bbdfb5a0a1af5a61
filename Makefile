# Every target sets itself up: a fresh machine needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow check docs format bench constraints clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)         ## the paper's claim at laptop size, about ten minutes
	$(BIN)/pkmem demo --out runs/demo --overwrite

test: $(INSTALLED)         ## the default suite
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=90

test-slow: $(INSTALLED)    ## the tests marked slow
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m slow -v

check: $(INSTALLED) docs   ## lint, format, types, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)         ## the documentation, into docs/_build/html
	$(BIN)/python docs/figures.py
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build/html

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)        ## operators, layer, training step and growth against peers, about half an hour
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pkmem bench

constraints: $(INSTALLED)  ## write the pins of what is installed now
	(echo "# Every pin of a green run; the Makefile installs with it. Regenerate: make constraints"; \
	 $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//') > constraints.txt

clean:
	rm -rf .venv docs/_build .pytest_cache .mypy_cache .ruff_cache .coverage*
