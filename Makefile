# One command on a fresh machine with Python 3.11+ and a C++ compiler; the first one builds the virtual environment.
#
#   make demo               pictures from the shipped weights, trained a little further under ZeRO-3 (no GPU needed)
#   make demo-from-scratch  the same with every part trained from nothing
#   make test               the tests;  make test-all adds the long ones, but neither of:
#   make test-fp8           8-bit products, with torchao in a folder of its own
#   make test-matrix        every parallel layout against one process, and checkpoints from each to each
#   make test-cluster       two nodes on this machine: launchers, a lost node, fewer nodes (root; apt-get packages it names)
#   make soak               trainings that are killed 50 times, and what that cost: KILLS=200 for more
#   make lint               ruff, mypy, import order
#   make image              build the Docker image: IMAGE=name IMAGE_ARGS="--build-arg DEVICE=cpu", see docs/images.md
#   make lint-image         the linter on the Dockerfile, and the fast tests of the image's parts
#   make test-image         build and run it on a bare Debian without Docker (root, buildah, debootstrap; 30 minutes)
#   make gpu-check          what only a GPU shows, in ten minutes: errors, bandwidth, steps; OUT=folder for results
#
# RAE_PYTHON=python3 uses that interpreter as it stands and installs nothing: for images that bring their own torch.

VENV ?= .venv
BASE_PYTHON ?= python3

ifdef RAE_PYTHON
PYTHON := $(RAE_PYTHON)
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

PYTEST := $(PYTHON) -m pytest
# One torch thread per pytest process: the tests are small and two workers share the cores.
TEST_ENV := OMP_NUM_THREADS=1
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo demo-from-scratch test test-all test-fp8 test-matrix test-cluster soak lint \
	image lint-image test-image gpu-check clean

help:
	@sed -n '/^#  /s/^#  *//p' Makefile

demo: $(READY)
	@RAE_PYTHON="$(PYTHON)" launchers/demo.sh

demo-from-scratch: $(READY)
	@RAE_PYTHON="$(PYTHON)" launchers/demo-from-scratch.sh

test: $(READY)
	@$(TEST_ENV) $(PYTEST) -n $(TEST_WORKERS) -m "not long and not matrix and not cluster and not gpu and not image"

test-all: $(READY)
	@$(TEST_ENV) $(PYTEST) -n $(TEST_WORKERS) -m "not matrix and not cluster and not image"

# One test at a time: each starts up to 12 processes.
test-matrix: $(READY)
	@$(TEST_ENV) $(PYTEST) -m matrix --durations=0

# One test at a time: each has two nodes with a training of its own.
test-cluster: $(READY)
	@$(TEST_ENV) $(PYTEST) -m cluster -rs --durations=0 tests/cluster

KILLS ?= 50
soak: $(READY)
	@$(PYTHON) tests/soak/storm.py --kills $(KILLS)

# Not in the virtual environment: wherever torchao is, transformers imports it, which costs every start a second.
FP8_PACKAGES := $(VENV)/fp8
test-fp8: $(READY)
	@test -n "$(RAE_PYTHON)" || test -d $(FP8_PACKAGES) || \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $(FP8_PACKAGES) torchao==0.18.0
	@$(TEST_ENV) PYTHONPATH=$(FP8_PACKAGES) $(PYTEST) tests/parallel/test_fp8.py

lint: $(READY)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

IMAGE ?= rae-scale
IMAGE_ARGS ?=
image:
	@docker build --tag $(IMAGE) --build-arg VERSION="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' rae_scale/__init__.py)" \
	--build-arg COMMIT="$$(git rev-parse HEAD)$$(git diff --quiet HEAD || echo -modified)" $(IMAGE_ARGS) .

lint-image: $(READY)
	@$(TEST_ENV) $(PYTEST) -m "not image" tests/image

test-image: $(READY)
	@$(TEST_ENV) $(PYTEST) -m image -rs -s tests/image

OUT ?= runs/gpu-check

gpu-check: $(READY)
	@PYTHONPATH=.:kernels $(PYTHON) -m rae_scale.bench.gpu_check --out $(OUT)

# pip's own resolver sees the pins and pyproject.toml's ranges together, so a pin outside its range fails here.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rae-scale needs Python 3.11 or newer, \
	$(BASE_PYTHON) is " + sys.version.split()[0] + "; name another one: make BASE_PYTHON=python3.12")'
	@echo "Installing the pinned requirements into $(VENV) (once, about 7 GB)"
	@test -x $(VENV)/bin/pip || $(BASE_PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
