# make setup   .venv with what training needs       make test    all tests that need no GPU
# make demo    text to an exported, tuned model      make check   format, lint, types, text
# make quick   the tests that start no processes and build no engines, and some that do: some of every folder
# make faults  every fault of docs/faults.md, including kills at random moments: ten minutes
# make gpu     all checks that need a GPU, in ten minutes; DEVICE=cpu rehearses it. OUT, MINUTES, WHEELS: docs/speed.md
# make wheels  what a GPU machine without network lacks, into wheels/; HAVE names a file with what it has
# make lock    newest versions of what requirements.txt and requirements-dev.txt need, into requirements.lock
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROCESSES ?= 2
WORKERS ?= 3
MINUTES ?= 10
OUT ?= runs/gpu
DEVICE ?= cuda
DEMO := configs/demo.yaml configs/tune_demo.yaml
UV := $(BIN)/uv pip
INSTALL := $(UV) install --python $(BIN)/python --constraint requirements.lock

# Packages are installed without bytecode: Python compiles a module at its first import and caches the result. Where an
# environment (such as a container's) forbids that, every process compiles everything again: torch and DeepSpeed take 11
# CPU seconds to import instead of 4.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup tools demo quick test faults gpu wheels check docs lock clean

setup: $(VENV)/.installed
tools: $(VENV)/.tools

# The stamps are renewed when the requirements change. pip installs torch, because it knows where this machine gets it
# from (a CPU build, or one for its CUDA); uv, several times as fast, keeps that and installs the rest, and the project
# in editable mode, so that its commands work from any folder.
$(VENV)/.installed: pyproject.toml requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Hopscotch needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch: 0.2 GB for a CPU, 3 GB with CUDA ..."
	$(BIN)/python -m pip install --quiet --no-compile --constraint requirements.lock torch uv
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.tools: $(VENV)/.installed requirements-dev.txt
	$(INSTALL) --requirement requirements-dev.txt
	@touch $@

demo: setup
	@$(BIN)/python -m launch.demo $(DEMO) --processes $(PROCESSES) --again "$(strip make demo $(MAKEOVERRIDES))"

# Three workers on two cores: tests spend much of their time waiting for ranks to start and daemons to answer.
quick: tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m "quick or not (processes or engines)"

test: tools
	OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

faults: tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m "slow or not slow" tests/faults

# Uses the existing environment: a borrowed machine has its own torch and no network.
gpu:
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m bench.gpu --device $(DEVICE) --minutes $(MINUTES) --out $(OUT) \
		$(if $(WHEELS),--wheels $(WHEELS))

wheels: setup
	$(BIN)/python -m bench.gpu.wheels wheels $(if $(HAVE),--have $(HAVE))

check: tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mdformat --check *.md docs

# The page of all config fields, from the schemas; a test fails when it is out of date.
docs: tools
	$(BIN)/python -m settings.reference trainer.config:PretrainConfig tune.config:TuneFile > docs/config.md
	$(BIN)/mdformat docs/config.md

# For every platform and every Python from 3.11 on; includes what CUDA builds of torch need, installed only with them.
lock: setup
	$(UV) compile --quiet --upgrade --universal --python-version 3.11 --no-annotate \
		--custom-compile-command "make lock" requirements-dev.txt --output-file requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
