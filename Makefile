# `make demo` shows int8cli at work on a real model, `make test` runs every check, `make benchmark` measures speed and
# memory beside `cp` and other converters. Each sets up what it needs, in the versions of requirements.lock.
# `make torture SECONDS=600` tries for that long to make it lose data. `make test-oldest` and `make test-newest` run the
# tests at both ends of the ranges in pyproject.toml, `make test-bare` runs the commands without what only the tests
# install, `make lock` makes the lock anew. See docs/development.md.

PYTHON ?= python3
# Which versions: locked, oldest or newest. Each has a virtual environment of its own.
END ?= locked
VENV := .venv$(if $(filter-out locked,$(END)),-$(END))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PINS := $(VENV)/pins.txt
BARE := .venv-bare$(if $(filter-out locked,$(END)),-$(END))
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A torch release in place of the locked one: `make test TORCH=2.14.0`. Its ends are not those of the rest, since not
# everywhere a CPU build of every release is to be had: `make test-oldest TORCH_OLDEST=oldest` takes the lower bound.
TORCH ?=
TORCH_OLDEST ?= $(TORCH)
TORCH_NEWEST ?= $(TORCH)
TORCH_OPTION = $(addprefix --torch ,$(TORCH_$(END)))
TORCH_locked = $(TORCH)
TORCH_oldest = $(TORCH_OLDEST)
TORCH_newest = $(TORCH_NEWEST)
# pip's torch for Linux comes with gigabytes of CUDA unless pip is configured to find a CPU build;
# `make test TORCH_BACKEND=cpu` takes the CPU build with uv.
TORCH_BACKEND ?=

# An hour on two cores, most of it the other converters; `make benchmark BENCHMARK="--gigabytes 8"` leaves them out.
BENCHMARK ?= --gigabytes 8 --peers 2 --growth 0.1 0.3 1 3 10

SECONDS ?= 600
TORTURE ?=

DEMO_MODEL := demo/SmolLM2-135M-Instruct
DEMO_INT8 := $(DEMO_MODEL)-int8

.PHONY: demo test test-oldest test-newest test-bare lock benchmark torture lint types pytest always clean

demo: $(READY)
	$(BIN)/python scripts/make_demo_model.py $(DEMO_MODEL)
	$(BIN)/int8cli convert $(DEMO_MODEL) --output $(DEMO_INT8)
	$(BIN)/python scripts/continue_sentence.py $(DEMO_MODEL) $(DEMO_INT8)

test: lint types pytest

benchmark: $(READY)
	$(BIN)/python scripts/benchmark.py $(BENCHMARK)

torture: $(READY)
	$(BIN)/python scripts/run_torture.py --seconds $(SECONDS) $(TORTURE)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

# A warning is an error in the locked versions, which we can change. Older and newer ones have warnings of their own.
pytest: $(READY)
	$(BIN)/pytest $(if $(filter-out locked,$(END)),-W default)

# Ends that are not locked say so by running pytest alone: linters and types are checked once, in the locked versions.
test-oldest:
	$(MAKE) pytest END=oldest

test-newest:
	$(MAKE) pytest END=newest

# The package as users install it, without what only the tests need.
test-bare: $(READY)
	$(PYTHON) -m venv --clear $(BARE)
	$(BARE)/bin/python -m pip install -qq --disable-pip-version-check --constraint requirements.lock pip
	$(call install_torch,$(BARE))
	$(BIN)/python scripts/check_bare_install.py $(BARE) $(END) $(TORCH_OPTION)

lock: .venv-lock/.ready
	.venv-lock/bin/python scripts/lock.py $(PACKAGE) $(if $(TORCH),--torch $(TORCH))

# The newest versions are looked up in every run.
$(READY): pyproject.toml requirements.lock requirements-oldest.lock $(if $(filter newest,$(END)),always)
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -qq --constraint requirements.lock hatchling packaging pip
	$(BIN)/python scripts/pins.py print $(END) $(TORCH_OPTION) > $(PINS)
	$(call install_torch,$(VENV))
	PIP_CONSTRAINT=$(PINS) $(PIP) install -qq --no-build-isolation --group dev --editable ".[calibrate,plots]"
	$(PIP) check
	$(BIN)/python scripts/pins.py check $(END) $(TORCH_OPTION)
	touch $@

ifneq ($(TORCH_BACKEND),)
install_torch = $(1)/bin/python -m pip install -qq --disable-pip-version-check --constraint $(PINS) uv && \
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python --torch-backend $(TORCH_BACKEND) --constraint $(PINS) torch
else
install_torch = $(1)/bin/python -m pip install -qq --disable-pip-version-check --constraint $(PINS) torch
endif

# Apart from the others, so that a lock which cannot be installed can be made anew.
.venv-lock/.ready: requirements.lock
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install -qq --disable-pip-version-check --constraint requirements.lock packaging uv
	touch $@

clean:
	rm -rf .venv .venv-* demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
