# make demo    install, train experiments/quickstart.py, evaluate, sample, write the report
# make test    install the test extras, run the suite, all but its slow tests
#              (make test MARKED=slow: those, every attention variant checked and trained among them)
#              (make test MARKED=plans PYTEST=: all presets but the smallest compiled again for TPUs, an hour)
# make coverage  the same under coverage, more slowly; fails below 90 % of lines
# make mutation  changes sampled lines of the library, counts how many changes a test notices (tests/MUTATION.md), an hour
#              (make mutation MUTATION="--folders optim --count 5": see python tests/mutation --help)
# make bench   measures speed and memory, 25 minutes on two idle cores: experiments/benchmarks/RESULTS.md
#              (make bench BENCH="text_step attention_layer" does some parts; make bench-gpu those for a GPU, 8 minutes)
# make lint    ruff
# make clean   remove the environment, caches and runs
#
# Another interpreter: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
TESTS  ?= tests
MARKED ?= not slow and not plans
PYTEST ?= -n 2 --dist loadfile
MUTATION ?= --table
BENCH  ?=

.PHONY: demo test coverage mutation bench bench-gpu lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/polygpt train experiments/quickstart.py

test: $(VENV)/.installed-test
	@$(BIN)/python -c "import torch, transformers" 2>/dev/null \
	  || echo "make test: torch and transformers are not installed, so the parity tests are skipped (CONTRIBUTING.md: Tests)"
	$(BIN)/python -m pytest -m "$(MARKED)" $(PYTEST) $(TESTS)

coverage:
	$(MAKE) test PYTEST="$(PYTEST) --cov --cov-report=term --cov-fail-under=90"

mutation: $(VENV)/.installed-test
	$(BIN)/python tests/mutation $(MUTATION)

bench: $(VENV)/.installed-test
	$(BIN)/python experiments/benchmarks $(BENCH)

bench-gpu: $(VENV)/.installed-test
	$(BIN)/python experiments/benchmarks --gpu

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis .mutation .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second call quick; a change of pyproject.toml installs again.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "polygpt needs Python >= 3.11, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing):" \
	            "name another with make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed pyproject.toml
	$(PIP) install --editable '.[test]'
	@touch $@
