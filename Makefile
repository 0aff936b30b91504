# make demo     train on scikit-learn's digits, then the same under MPI with uneven shards
# make test     run the tests against the installed package
# make lint     ruff, mypy, the import rules
# make parity   compare live with torch 2.13 on the CPU
# make violations   plant ten violations of the contract, drawn at random: each must fail exactly its tests
# make coverage     line coverage of arraynorm/
# make cuda-check   every CUDA kernel in the emulator, and compiled by NVRTC for every architecture: needs no GPU
# make gpu          on a machine with a GPU: the suite on CuPy, compute-sanitizer, the benchmark; a JSON record
#
# Each environment, .venv/EXTRA, holds the package as a user would have it (not editable) with the extra of that
# name from pyproject.toml, all from pip, the MPI included. It is brought up to date when a source file has changed.

PYTHON ?= python3
JOBS ?= 2

SOURCES := $(shell find arraynorm -type f ! -name '*.pyc')
PIP := -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint parity violations coverage cuda-check gpu clean
.DELETE_ON_ERROR:

demo: .venv/demo/installed
	.venv/demo/bin/python examples/digits.py --out demo-results
	.venv/demo/bin/mpiexec -n 2 .venv/demo/bin/python examples/digits.py --sync

# In tests/, so that the checkout's arraynorm/ is not importable: see tests/conftest.py.
test: .venv/test/installed
	cd tests && ARRAYNORM_TEST_INSTALLED=1 ../.venv/test/bin/pytest -n $(JOBS)

lint: .venv/dev/installed
	.venv/dev/bin/ruff check .
	.venv/dev/bin/ruff format --check .
	.venv/dev/bin/mypy
	.venv/dev/bin/lint-imports

parity: .venv/dev/torch
	cd tests && ARRAYNORM_TEST_INSTALLED=1 ../.venv/dev/bin/pytest -n $(JOBS) -m parity

violations: .venv/dev/installed
	.venv/dev/bin/python tests/plant.py --count 10

coverage: .venv/dev/installed
	cd tests && ../.venv/dev/bin/pytest -n $(JOBS) --cov=arraynorm --cov-report=term-missing

# What was compiled or run before, from the same sources, is reused, and said to be.
cuda-check: .venv/cuda-check/installed
	cd tests && ../.venv/cuda-check/bin/python -m cuda.check --jobs $(JOBS)

# torch comes with CUDA from PyPI on Linux; without it the benchmark has our columns alone.
gpu: .venv/gpu/installed
	.venv/gpu/bin/python benchmarks/gpu.py

.venv/%/installed: pyproject.toml $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "arraynorm needs Python 3.11 or newer: make PYTHON=python3.x")'
	test -x .venv/$*/bin/python || $(PYTHON) -m venv .venv/$*
	.venv/$*/bin/python $(PIP) install '.[$*]'
	touch $@

# The version matters: it is the peer that every comparison names.
.venv/dev/torch: .venv/dev/installed
	.venv/dev/bin/python $(PIP) install torch==2.13.0
	touch $@

clean:
	rm -rf .venv build dist demo-results
