# make setup   .venv with everything            make test    all tests that need no GPU
# make demo    text to an exported, tuned model   make check   format, lint, types
# make quick   the tests that start no processes, and one of each folder that has only such: two minutes
# make faults  every fault of docs/faults.md, kills at random moments among them: ten minutes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROCESSES ?= 2
DEMO := configs/demo.yaml configs/tune_demo.yaml

.PHONY: setup demo quick test faults check clean

setup: $(VENV)/.installed

# The stamp is renewed when the requirements change. DeepSpeed builds from source and must see the same torch.
$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Hopscotch needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python -m launch.demo $(DEMO) --processes $(PROCESSES)

quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "quick or not processes"

test: setup
	OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m "slow or not slow" tests/faults

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The page of all config fields, from the schemas; a test says when it is out of date.
docs: setup
	$(BIN)/python -m settings.reference trainer.config:RunConfig tune.config:TuneFile > docs/config.md

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
