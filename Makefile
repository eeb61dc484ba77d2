# `make demo` and `make test` need nothing but make and Python 3.11 or newer: the first one to run
# makes .venv from requirements.lock; later ones install nothing until the lock or pyproject.toml change.

PYTHON ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
LLAMA_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
# Say nothing but errors; where packages come from is left to pip's own settings.
PIP := -m pip -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## the main path in a minute: a small sweep, its picture, the number to expect
	$(BIN)/mupjax quickstart $(DEMO_ARGS)

test: $(STAMP) ## the fast tests (more options in PYTEST_ARGS)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-all: $(STAMP) ## all tests, the slow ones too
	$(BIN)/python -m pytest -m "" -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP) ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(STAMP) ## rewrite the source in the house format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(STAMP) ## time the engine
	$(BIN)/python -m benchmarks.speed_engine $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.speed_llama $(LLAMA_ARGS)

# Sets $$python to the first candidate that is new enough and can make an environment, or ends with one
# line that says why none will do. PYTHON=... leaves only that candidate.
define find_python
	reason="was not found"; python=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3 python3.12 python3.13); do \
	    command -v "$$candidate" >/dev/null 2>&1 || continue; \
	    if ! "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        test "$$reason" = "has no venv module" || reason="was found, but too old or broken"; \
	    elif ! "$$candidate" -c 'import venv, ensurepip' 2>/dev/null; then \
	        reason="has no venv module"; \
	    else python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "mupjax needs Python 3.11 or newer with its venv module: $(or $(PYTHON),python3.11 or python3) $$reason. Install one, or name one: make PYTHON=..." >&2; \
	    exit 1; \
	fi
endef

# The stamp is there only while the last install is complete. Without it, an environment may be half
# made (pip can take a package whose files are half written for installed), so it is made anew.
# The stamp's time is the start of the install: a file changed meanwhile is newer.
$(STAMP): pyproject.toml requirements.lock
	@set -eu; \
	if [ -f $(STAMP) ] && $(BIN)/python -c '' 2>/dev/null; then \
	    echo "pyproject.toml or requirements.lock changed: updating .venv"; \
	    mv $(STAMP) .venv/.installing; touch .venv/.installing; \
	else \
	    $(find_python); \
	    echo "installing into .venv (once, a minute or two)"; \
	    rm -f $(STAMP); \
	    "$$python" -m venv --clear .venv; \
	    touch .venv/.installing; \
	fi; \
	$(BIN)/python $(PIP) install -r requirements.lock; \
	$(BIN)/python $(PIP) install --no-deps --no-build-isolation --editable .; \
	mv .venv/.installing $(STAMP)

# setuptools and wheel are locked too: the package itself is then built without fetching anything.
lock: ## write requirements.lock anew from pyproject.toml (Python 3.11, Linux, CPU)
	@set -eu; \
	$(find_python); \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	    echo "the lock is made with Python 3.11: make lock PYTHON=python3.11" >&2; exit 1; }; \
	trap 'rm -rf build/lock' EXIT; \
	"$$python" -m venv --clear build/lock; \
	build/lock/bin/python $(PIP) install --editable '.[dev]' 'setuptools>=77' wheel; \
	build/lock/bin/python -m pip --disable-pip-version-check freeze --all --exclude-editable > build/lock/frozen; \
	if grep -v '^[A-Za-z0-9_.-]*==[A-Za-z0-9_.+!-]*$$' build/lock/frozen >&2; then \
	    echo "the lines above are not name==version: requirements.lock is left as it was" >&2; exit 1; fi; \
	{ echo "# Made by 'make lock' with Python 3.11 on Linux, CPU only; do not edit: change pyproject.toml and run it again."; \
	    grep -v '^pip==' build/lock/frozen; } > build/lock/requirements; \
	mv build/lock/requirements requirements.lock; \
	echo "requirements.lock: $$(grep -c == requirements.lock) packages"

clean: ## remove the environment, builds and caches; saved results in runs/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
