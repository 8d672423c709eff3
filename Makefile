# `make demo` runs int8cli on a real model, `make test` runs every check, `make benchmark` compares speed and memory with
# `cp` and other converters. Each installs what it needs, in the versions of requirements.lock.
# `make torture SECONDS=600` tries for that long to make it lose data. `make test-oldest` and `make test-newest` run the
# tests at both ends of the ranges in pyproject.toml, `make test-bare` runs the commands without test dependencies,
# `make test-ray` and `make test-s3` run tests that need a cluster or an S3 server on this machine, `make test-vllm` opens
# what int8cli writes in vLLM, `make test-lm-eval` has lm-eval judge it, `make lock` and `make lock-vllm` update the lock
# files. See docs/development.md.

PYTHON ?= python3
COMMA := ,
# Which versions: locked, oldest, newest, or those that vllm asks for. Each has its own virtual environment.
END ?= locked
VENV := .venv$(if $(filter-out locked,$(END)),-$(END))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PINS := $(VENV)/pins.txt
# What is installed beside the package, with which extras, and which tests run.
GROUP := $(if $(filter vllm,$(END)),vllm,dev)
EXTRAS := $(if $(filter vllm,$(END)),calibrate,calibrate$(COMMA)plots)
LOCKS := $(if $(filter vllm,$(END)),requirements-vllm.lock,requirements-oldest.lock)
BARE := .venv-bare$(if $(filter-out locked,$(END)),-$(END))
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A torch release instead of the locked one: `make test TORCH=2.14.0`. By default, all ends use the locked torch, because
# CPU builds are not available everywhere. `make test-oldest TORCH_OLDEST=oldest` uses the lower bound.
TORCH ?=
TORCH_OLDEST ?= $(TORCH)
TORCH_NEWEST ?= $(TORCH)
TORCH_OPTION = $(addprefix --torch ,$(TORCH_$(END)))
TORCH_locked = $(TORCH)
TORCH_oldest = $(TORCH_OLDEST)
TORCH_newest = $(TORCH_NEWEST)
# For Linux, pip installs torch with gigabytes of CUDA libraries, unless it is configured to find a CPU build.
# `make test TORCH_BACKEND=cpu` installs the CPU build with uv.
TORCH_BACKEND ?=

# Takes an hour on two cores, mostly for other converters. `make benchmark BENCHMARK="--gigabytes 8"` leaves them out.
BENCHMARK ?= --gigabytes 8 --peers 2 --growth 0.1 0.3 1 3 10

TESTS ?=
UNLOCKED ?=

SECONDS ?= 600
TORTURE ?=

# The tests read and write text in UTF-8 in every locale. The package does so by itself.
export PYTHONUTF8 := 1

DEMO_MODEL := demo/SmolLM2-135M-Instruct
DEMO_INT8 := $(DEMO_MODEL)-int8
DEMO_PAGE := demo/report.html

.PHONY: demo test test-oldest test-newest test-bare test-ray test-s3 test-vllm test-lm-eval lock lock-vllm benchmark torture \
	lint types pytest always clean

demo: $(READY)
	$(BIN)/python scripts/make_demo_model.py $(DEMO_MODEL)
	$(BIN)/int8cli convert $(DEMO_MODEL) --output $(DEMO_INT8) --report $(DEMO_PAGE)
	$(BIN)/python scripts/show_what_was_won.py $(DEMO_MODEL) $(DEMO_INT8)
	@echo "The error of every layer, as a page for a browser: $(DEMO_PAGE)"
	$(BIN)/int8cli generate $(DEMO_INT8) "The moon rose over the quiet harbour, and" --raw --max-new-tokens 24 --compare $(DEMO_MODEL)

test: lint types pytest

benchmark: $(READY)
	$(BIN)/python scripts/benchmark.py $(BENCHMARK)

torture: $(READY)
	$(BIN)/python scripts/run_torture.py --seconds $(SECONDS) $(TORTURE)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive int8cli scripts
	$(BIN)/python scripts/audit.py

types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

# A warning is an error in the locked versions, which we can change. Older and newer ones have warnings of their own.
pytest: $(READY)
	$(BIN)/pytest $(if $(filter-out locked,$(END)),-W default) $(TESTS)

# Linters and types are checked only in the locked versions.
test-oldest:
	$(MAKE) pytest END=oldest

test-newest:
	$(MAKE) pytest END=newest

# Ray is large, and nothing else needs it: its tests have an environment of their own, beside that of the others.
test-ray: .venv-ray/.ready
	.venv-ray/bin/python -m pytest -n 0 tests/test_ray.py $(TESTS)

.venv-ray/.ready: $(READY)
	$(call beside,.venv-ray)
	.venv-ray/bin/python -m pip install -qq --disable-pip-version-check --constraint $(PINS) ray
	touch $@

# A server for S3 and its client are 29 packages, which nothing else needs: likewise. Their versions are locked.
test-s3: .venv-s3/.ready
	.venv-s3/bin/python -m pytest -n 0 tests/test_remote.py $(TESTS)

.venv-s3/.ready: $(READY)
	$(call beside,.venv-s3)
	$(BIN)/python -m pip --python .venv-s3/bin/python install -qq --disable-pip-version-check --constraint $(PINS) --group s3
	touch $@

# lm-eval brings 40 packages, which nothing else needs: likewise. They would hold back the oldest versions, so only those
# that the lock file has anyway are locked.
LM_EVAL := lm-eval==0.4.13
test-lm-eval: .venv-lm-eval/.ready
	.venv-lm-eval/bin/python -m pytest -n 0 tests/test_lm_eval.py $(TESTS)

.venv-lm-eval/.ready: $(READY)
	$(call beside,.venv-lm-eval)
	.venv-lm-eval/bin/python -m pip install -qq --disable-pip-version-check --constraint $(PINS) $(LM_EVAL)
	touch $@

# An empty environment that finds what is installed in the other one.
define beside
$(PYTHON) -m venv --clear $(1)
$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
	> "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
endef

# What vLLM's CPU build makes of the output. A process that has it takes gigabytes, so the tests run one after the other.
# vLLM asks for a CPU build of torch, for which pip needs TORCH_BACKEND=cpu unless it is configured to find one.
test-vllm:
	$(MAKE) pytest END=vllm TESTS="-n 0 tests/vllm $(TESTS)"

# The package as users install it, without test dependencies.
test-bare: $(READY)
	$(PYTHON) -m venv --clear $(BARE)
	$(BARE)/bin/python -m pip install -qq --disable-pip-version-check --constraint requirements.lock pip
	$(call install_torch,$(BARE))
	$(BIN)/python scripts/check_bare_install.py $(BARE) $(END) $(TORCH_OPTION)

# Installs the newest versions, and locks what pip has chosen.
lock-vllm:
	rm -rf .venv-vllm
	: > requirements-vllm.lock
	$(MAKE) .venv-vllm/.ready END=vllm UNLOCKED=yes
	.venv-vllm/bin/python scripts/lock_vllm.py

lock: .venv-lock/.ready
	.venv-lock/bin/python scripts/lock.py $(PACKAGE) $(if $(TORCH),--torch $(TORCH))

# The newest versions are looked up every time. Of torchvision and its kin, which vLLM asks for, the builds on PyPI do not
# load beside a CPU build of torch (`operator torchvision::nms does not exist`). The vision models want torchvision, and
# none of its operators: what declares these is passed over.
$(READY): pyproject.toml requirements.lock $(LOCKS) $(if $(filter newest,$(END)),always)
	@echo "Installing into $(VENV). This is silent and takes minutes: on Linux, torch brings up to 5.4 GB of CUDA"
	@echo "libraries (three minutes on a fast line). TORCH_BACKEND=cpu leaves them out."
	$(PYTHON) scripts/check_python.py
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -qq --constraint requirements.lock hatchling packaging pip
	$(BIN)/python scripts/pins.py print $(END) $(TORCH_OPTION) > $(PINS)
	$(call install_torch,$(VENV))
	PIP_CONSTRAINT=$(PINS) $(PIP) install -qq --no-build-isolation --group $(GROUP) --editable ".[$(EXTRAS)]"
ifeq ($(END),vllm)
	$(PIP) uninstall -qq --yes torchaudio torchcodec
	echo 'import sys, types; name = "torchvision._meta_registrations"; sys.modules[name] = types.ModuleType(name)' \
		> "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/torchvision_without_operators.pth"
else
	$(PIP) check
endif
	$(if $(UNLOCKED),,$(BIN)/python scripts/pins.py check $(END) $(TORCH_OPTION))
	touch $@

ifneq ($(TORCH_BACKEND),)
install_torch = $(1)/bin/python -m pip install -qq --disable-pip-version-check --constraint $(PINS) uv && \
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python --torch-backend $(TORCH_BACKEND) --constraint $(PINS) torch
else
install_torch = $(1)/bin/python -m pip install -qq --disable-pip-version-check --constraint $(PINS) torch
endif

# A separate environment, so that lock files can be updated even if they cannot be installed.
.venv-lock/.ready: requirements.lock
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install -qq --disable-pip-version-check --constraint requirements.lock packaging uv
	touch $@

clean:
	rm -rf .venv .venv-* demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
