# make demo    installs into .venv and compares every reducer at three budgets (minutes)
# make leaderboard-quick  runs six points of the leaderboard again, and compares (needs Fashion-MNIST; minutes)
# make test    installs into .venv, checks style and types, runs the fast tests
# Any of PYTHON, VENV, DEMO and PYTEST_ARGS can be given: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO ?= results/demo
BIN := $(VENV)/bin
# Sources are compiled once, and not by each of the many processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo report leaderboard-quick test test-all lint format clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make report  draws results/ again: CSV, Markdown, HTML, PNG"
	@echo "make lint    style and types only;  make format  repairs the style"
	@echo "make clean   removes .venv, builds and caches; checkpoints and results stay"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; type: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { echo "error: no virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# A stamp per set of extras: pip runs again only after pyproject.toml has changed.
$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[report]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test,report]'
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo
	$(BIN)/python eval.py -m weights=vit_digits data=digits "reducer=glob(*)" \
		schedule=target_gmacs schedule.fraction=0.75,0.5,0.35 schedule.nearest=true \
		task=[accuracy,flops,throughput,fidelity] \
		throughput.rounds=5 hydra.sweep.dir=$(DEMO) \
		hydra.callbacks.report.also=results/digits/trained.jsonl

report: $(VENV)/.installed-demo
	$(BIN)/zoo report results

leaderboard-quick: $(VENV)/.installed-demo
	$(BIN)/python -m benchmarks.leaderboard --quick

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n auto -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist results/demo *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
