# make run and make test do all the set-up they need, on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup run test lint slow bench drill ui lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "headrace needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the locked packages into .venv (about two minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

run: setup
	@$(BIN)/headrace run

test: setup lint
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

slow: setup
	@$(BIN)/python -m pytest -m "slow" -n 2 --dist loadfile

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: setup
	@for name in benchmarks/[!_h]*.py; do $(BIN)/python $$name --quick || exit 1; done

# Not in CI: what kills, cuts and stops in the tests, over and over (make drill DRILLS=30). The run
# that is killed and resumed is killed 30 times a round instead of 10, at other moments each round.
DRILLS ?= 10
drill: setup
	@for round in $$(seq $(DRILLS)); do echo "round $$round of $(DRILLS)"; \
		HEADRACE_DRILL_KILLS=30 HEADRACE_DRILL_SEED=$$round \
			$(BIN)/python -m pytest -q -n 2 -k "kill or cut or stop or orphan or torn" tests || exit 1; \
	done

ui: setup
	@$(BIN)/headrace ui

lock: setup
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock.new
	@{ sed -n '/^#/p' requirements.lock; cat requirements.lock.new; } > requirements.lock.all
	@mv requirements.lock.all requirements.lock && rm requirements.lock.new

clean:
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
