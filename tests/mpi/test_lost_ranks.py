"""A rank that dies under Open MPI's ULFM: all others raise the same kind of error, and can go on without it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launching import launch, open_mpi

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "survive_a_lost_rank.py"
OPEN_MPI = open_mpi()

pytestmark = pytest.mark.skipif(
    OPEN_MPI is None,
    reason="needs Open MPI, whose mpiexec has --with-ft ulfm: in this environment, or in ARRAYNORM_OPENMPI=folder",
)


# Without MPI_Finalize, for the reason in the example.
OPTIONS = ("--with-ft", "ulfm", "-x", "MPI4PY_RC_FINALIZE=0")


def run(folder, *program):
    mpiexec, python = OPEN_MPI
    status = launch(4, folder, python, *program, mpiexec=mpiexec, options=OPTIONS, deadline=240)
    return status, (folder / "mpiexec").read_text(errors="replace")


def run_job(folder, when, ending):
    status, log = run(folder, str(HERE / "lost_rank_job.py"), when, ending)
    assert status is not None, f"the job hangs\n{log}"
    return status, log


@pytest.mark.parametrize("when", ["before", "between", "payload", "asleep"])
def test_the_others_raise_and_go_on_without_the_rank_that_died(when, tmp_path):
    status, log = run_job(tmp_path, when, "shrink")
    said = dict(re.findall(r"^rank (\d): (\w+) \d", log, re.MULTILINE))
    assert said == dict.fromkeys("013", "SyncRankFailedError"), log
    # told, not timed out: the deadline of the job is 20 s, and MPI tells within a second
    assert all(float(seconds) < 15 for seconds in re.findall(r"SyncRankFailedError (\S+):", log)), log
    assert sorted(re.findall(r"goes on as rank (\d) of 3", log)) == ["0", "1", "2"], log
    assert "used the broken communicator" not in log
    assert "ABORT" not in log
    assert status == 0, log


@pytest.mark.parametrize("ending", ["uncaught", "caught", "one"])
def test_a_rank_that_exits_without_having_gone_on_ends_the_job(ending, tmp_path):
    status, log = run_job(tmp_path, "between", ending)
    assert status != 0, log
    assert "goes on" not in log


def test_the_peers_of_a_rank_whose_mpi_refuses_a_call_raise_at_once(tmp_path):
    status, log = run_job(tmp_path, "refused", "uncaught")
    said = dict(re.findall(r"^rank (\d): (\w+) \d", log, re.MULTILINE))
    assert said["2"] == "SyncError", log
    assert {said[rank] for rank in said if rank != "2"} <= {"SyncRankFailedError"}, log
    assert "SyncTimeoutError" not in log
    assert status != 0, log


def missing_for_the_example():
    """Modules that the example needs and the environment with Open MPI lacks."""
    names = ("sklearn", "matplotlib", "tqdm")
    look = f"import importlib.util as u; print(*[n for n in {names} if u.find_spec(n) is None])"
    return subprocess.run([OPEN_MPI[1], "-c", look], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("lost", [["2:30"], ["0:20", "3:50"]])
def test_training_that_loses_ranks_ends_as_one_process_does(lost, tmp_path):
    if missing := missing_for_the_example():
        pytest.skip(f"the environment with Open MPI lacks {', '.join(missing)}, which the example needs")
    status, log = run(tmp_path, str(EXAMPLE), "--lose", *lost)
    assert status == 0, f"exit status {status}\n{log}"
    dead = {entry[0] for entry in lost}
    for number, entry in enumerate(lost):
        rank, step = entry.split(":")
        left = sorted(set("0123") - {e[0] for e in lost[: number + 1]})
        told = re.findall(rf"^rank (\d): {len(left)} ranks are left and go on with step {step}$", log, re.MULTILINE)
        assert sorted(told) == left, log
        assert not re.search(rf"^rank {rank}: SyncRankFailedError.*step {int(step) + 1},", log, re.MULTILINE), log
    assert not any(re.search(rf"^rank {rank}: those that were left", log, re.MULTILINE) for rank in dead)
    survivors, alone = re.findall(r": (\S+) % right of 500$", log, re.MULTILINE)
    assert survivors == alone
    assert float(alone) > 90  # guessing gives 10
    (apart,) = re.findall(r"greatest relative difference of a parameter or buffer: (\S+) ", log)
    assert float(apart) < 1e-9  # rounding gives 1e-15; one batch left out, 1e-2
