"""Tests that run on several ranks: `mpiexec -n 3 python -m pytest tests/mpi`, which test_under_mpiexec.py starts too.

Every rank runs the same tests in the same order. The first failure ends the run on all ranks, for the peers of a
rank that left a test early would wait for it, or meet it in the next one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arraynorm.distributed._resolve import launched_ranks

RANKS = launched_ranks(os.environ)
STARTERS = (
    "test_under_mpiexec.py",
    "test_cost_benchmark.py",
    "test_faulty_jobs.py",
    "test_lost_ranks.py",
    "test_two_hosts.py",
)

# On one rank the tests of ranks are not for collection: the starters run them.
collect_ignore = [
    path.name for path in Path(__file__).parent.glob("test_*.py") if (path.name in STARTERS) == (RANKS > 1)
]


def pytest_configure(config):
    if RANKS > 1:
        config.option.maxfail = 1


def pytest_collection_modifyitems(items):
    if RANKS > 1:
        for item in items:
            # A thread ends the process; a signal would wait until MPI's C code returns to Python.
            item.add_marker(pytest.mark.timeout(60, method="thread"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    result = yield  # the terminal has shown the failure
    if RANKS > 1 and exitstatus:
        from mpi4py import MPI

        session.config.get_terminal_writer().flush()
        MPI.COMM_WORLD.Abort(int(exitstatus))
    return result


@pytest.fixture
def world(request):
    """mpi4py's COMM_WORLD, once all ranks have come to this very test."""
    from mpi4py import MPI

    size = MPI.COMM_WORLD.Get_size()
    assert size == RANKS, f"mpiexec started {RANKS} ranks, MPI sees {size}: the launcher is another MPI library's"
    assert set(MPI.COMM_WORLD.allgather(request.node.nodeid)) == {request.node.nodeid}
    return MPI.COMM_WORLD
