"""Starting mpiexec from a test, with an end to every wait."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
DEADLINE = 150  # seconds for one launch of two or three ranks; it takes about 5

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


def open_mpi():
    """(mpiexec, python) of an environment with Open MPI: this one, or the one that ARRAYNORM_OPENMPI names; or None."""
    candidates = [(MPIEXEC, sys.executable)]
    if folder := os.environ.get("ARRAYNORM_OPENMPI"):
        candidates.insert(0, (shutil.which("mpiexec", path=Path(folder) / "bin"), str(Path(folder) / "bin/python")))
    for mpiexec, python in candidates:
        said = mpiexec and subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=60).stdout
        if said and "Open MPI" in said:
            return mpiexec, python
    return None


def launch(ranks, folder, *program, mpiexec=MPIEXEC, options=(), deadline=DEADLINE):
    """Run a program under mpiexec, which writes to `folder`; the exit status, or None past the deadline."""
    command = [mpiexec, *options, "-n", str(ranks), *program]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | OPEN_MPI
    with (folder / "mpiexec").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=HERE,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(deadline)
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
