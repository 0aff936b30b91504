"""Run this folder's tests under mpiexec."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from launching import DEADLINE, launch, open_mpi, pytestmark  # noqa: F401

HERE = Path(__file__).parent

# A file for each rank, since mpiexec mixes the lines of all of them.
RANK = 'exec "$0" -m pytest -v -p no:cacheprovider "$1" >"$2/rank-${PMI_RANK:-$OMPI_COMM_WORLD_RANK}" 2>&1'


def without_passed(log):
    return "".join(line for line in log.splitlines(keepends=True) if " PASSED" not in line)


RUNS = [
    (2, "."),
    (3, "."),
    (8, "test_sweep.py"),  # those alone that look at every number of ranks, in groups of 2 to 8
    *(pytest.param(ranks, ".", marks=pytest.mark.thorough) for ranks in (4, 8)),
]


@pytest.mark.parametrize(("ranks", "tests"), RUNS)
@pytest.mark.timeout(700)
def test_all_tests_of_this_folder_pass_on_every_rank(ranks, tests, tmp_path):
    passes_on_every_rank(ranks, tests, tmp_path, sys.executable)


@pytest.mark.skipif(open_mpi() is None, reason="needs Open MPI, whose mpiexec has --with-ft ulfm")
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_communicator_of_which_all_live_can_be_shrunk_where_the_launcher_allows_it(ranks, tmp_path):
    mpiexec, python = open_mpi()
    passes_on_every_rank(ranks, "test_shrink.py", tmp_path, python, mpiexec=mpiexec, options=("--with-ft", "ulfm"))


def passes_on_every_rank(ranks, tests, folder, python, **launching):
    # Ranks that wait in MPI's own calls spin: eight on two busy cores take minutes.
    deadline = max(DEADLINE, 75 * ranks)
    command = ("sh", "-c", RANK, python, str(HERE / tests), str(folder))
    status = launch(ranks, folder, *command, deadline=deadline, **launching)
    logs = {name: folder / name for name in ("mpiexec", *(f"rank-{rank}" for rank in range(ranks)))}
    texts = {name: log.read_text() if log.exists() else "" for name, log in logs.items()}
    # Passed and nothing else: a test that one rank skips has not been run with all ranks.
    passed = [re.search(r"\n=+ (\d+) passed in [^,]*=\n$", texts[f"rank-{rank}"]) for rank in range(ranks)]
    if status != 0 or not all(passed):
        report = "".join(f"\n--- {name}\n{without_passed(text)}" for name, text in texts.items())
        pytest.fail(f"mpiexec -n {ranks}: exit status {status} within {deadline} s{report}", pytrace=False)
    assert len({match[1] for match in passed}) == 1
