# `make demo` shows int8cli at work on a real model, `make test` runs every check, `make benchmark` measures speed and
# memory beside `cp` and other converters. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A plain `torch` brings several GB of CUDA libraries; this release is what the tests run with.
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready

# An hour on two cores, most of it the other converters; `make benchmark BENCHMARK="--gigabytes 8"` leaves them out.
BENCHMARK ?= --gigabytes 8 --peers 2 --growth 0.1 0.3 1 3 10

DEMO_MODEL := demo/SmolLM2-135M-Instruct
DEMO_INT8 := $(DEMO_MODEL)-int8

.PHONY: demo test benchmark lint types pytest clean

demo: $(READY)
	$(BIN)/python scripts/make_demo_model.py $(DEMO_MODEL)
	$(BIN)/int8cli convert $(DEMO_MODEL) --output $(DEMO_INT8)
	$(BIN)/python scripts/continue_sentence.py $(DEMO_MODEL) $(DEMO_INT8)

test: lint types pytest

benchmark: $(READY)
	$(BIN)/python scripts/benchmark.py $(BENCHMARK)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

pytest: $(READY)
	$(BIN)/pytest

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -qq --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
