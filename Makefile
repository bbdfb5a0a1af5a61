# Every target sets itself up: a fresh machine needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow check format bench constraints clean
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

check: $(INSTALLED)        ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .coverage*
