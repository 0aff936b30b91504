"""Run this folder's tests under mpiexec."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
DEADLINE = 150  # seconds for one launch; it takes about 5

# A file for each rank, since mpiexec mixes the lines of all of them.
RANK = 'exec "$0" -m pytest -v -p no:cacheprovider "$1" >"$2/rank-${PMI_RANK:-$OMPI_COMM_WORLD_RANK}" 2>&1'

# Open MPI refuses to run as root, and more ranks than cores, unless told to.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
# What a launcher of this very process has set would make the new ranks its own; and pytest's options are not theirs.
FOREIGN = ("PMI", "HYDI_", "MPI_LOCAL", "OMPI_COMM_", "PYTEST_")

pytestmark = [
    pytest.mark.skipif(MPIEXEC is None, reason="mpiexec is missing (pip install mpich)"),
    pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is missing (pip install mpi4py)"),
]


def launch(ranks, folder):
    """Run mpiexec; its exit status, or None where it ran past the deadline. It and the ranks write to `folder`."""
    command = [MPIEXEC, "-n", str(ranks), "sh", "-c", RANK, sys.executable, str(HERE), str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | OPEN_MPI
    with (folder / "mpiexec").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=HERE.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        stop(process)


def stop(process):
    """End mpiexec and all that it has started, if it still runs."""
    for number in (signal.SIGTERM, signal.SIGKILL):  # asked to, it ends ranks outside its process group as well
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


def without_passed(log):
    return "".join(line for line in log.splitlines(keepends=True) if " PASSED" not in line)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_tests_of_this_folder_pass_on_every_rank(ranks, tmp_path):
    status = launch(ranks, tmp_path)
    logs = {name: tmp_path / name for name in ("mpiexec", *(f"rank-{rank}" for rank in range(ranks)))}
    texts = {name: log.read_text() if log.exists() else "" for name, log in logs.items()}
    # Passed and nothing else: a test that one rank skips has not been run with all ranks.
    passed = [re.search(r"\n=+ (\d+) passed in [^,]*=\n$", texts[f"rank-{rank}"]) for rank in range(ranks)]
    if status != 0 or not all(passed):
        report = "".join(f"\n--- {name}\n{without_passed(text)}" for name, text in texts.items())
        pytest.fail(f"mpiexec -n {ranks}: exit status {status} within {DEADLINE} s{report}", pytrace=False)
    assert len({match[1] for match in passed}) == 1
