"""Training over two hosts that reach each other over TCP only: equal to one process; and what a cut cable does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launching import FOREIGN, MPIEXEC, OPEN_MPI, pytestmark  # noqa: F401
from mpi.two_hosts import NotPossibleHereError, TwoHosts, until

JOB = Path(__file__).with_name("two_hosts_job.py")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | OPEN_MPI
PYTHON = f"{sys.executable}\0{JOB}".encode()  # how the command line of a rank begins
RANKS = range(4)
CHANNELS = 4096
DEADLINE = 120  # seconds for what takes 10 on a quiet machine


@pytest.fixture
def hosts():
    try:
        entered = TwoHosts().__enter__()
    except NotPossibleHereError as error:
        pytest.skip(f"two hosts can't be made here: {error}")
    try:
        yield entered
    finally:
        entered.__exit__()


def start(hosts, folder, steps, pause, timeout):
    version = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, timeout=60).stdout
    with (folder / "mpiexec").open("w") as log:
        program = sys.executable, str(JOB), str(folder), str(CHANNELS), str(steps), str(pause), str(timeout)
        return hosts.launch(MPIEXEC, "Open MPI" in version, ENVIRONMENT, log, *program)


def said(folder):
    """What each rank wrote to its file, and all of it with what mpiexec saw."""
    files = [folder / f"rank-{rank}" for rank in RANKS]
    texts = [file.read_text() if file.exists() else "" for file in files]
    return texts, "\n".join([*texts, (folder / "mpiexec").read_text(errors="replace")])


def ranks_on(hosts):
    """The ids of the job's Python processes."""
    commands = {pid: Path(f"/proc/{pid}/cmdline") for name in hosts.names for pid in hosts.processes(name)}
    return [pid for pid, file in commands.items() if file.exists() and file.read_bytes().startswith(PYTHON)]


def test_training_over_two_hosts_is_batch_norm_on_the_whole_batch_and_crosses_the_network(hosts, tmp_path):
    steps = 5
    before = [hosts.received(name) for name in hosts.names]
    status = start(hosts, tmp_path, steps, 0, 60).wait(DEADLINE)
    received = [hosts.received(name) - had for name, had in zip(hosts.names, before, strict=True)]
    texts, everything = said(tmp_path)
    assert status == 0, everything
    assert [text.split()[1] for text in texts] == [hosts.names[0]] * 2 + [hosts.names[1]] * 2
    assert all(f"step {steps - 1}" in text for text in texts), everything
    # A host needs the other's statistics, [n, mean, m2] of one rank at least, and its sums, [sum dy, sum dy x_hat].
    payload = 8 * (1 + 2 * CHANNELS) + 8 * 2 * CHANNELS
    assert min(received) >= steps * payload, received


def test_when_the_cable_is_cut_all_ranks_raise_within_the_deadline_and_end(hosts, tmp_path):
    timeout = 6.0
    process = start(hosts, tmp_path, 100_000, 0.05, timeout)
    trains = lambda: all("step 2\n" in text for text in said(tmp_path)[0])  # noqa: E731
    until(lambda: trains() or process.poll() is not None, DEADLINE)
    assert trains(), said(tmp_path)[1]
    hosts.cut()
    # The ranks that are still awaited by others give up last: one timeout, and what a loaded machine adds.
    assert until(lambda: all("Sync" in text for text in said(tmp_path)[0]), timeout + 20), said(tmp_path)[1]
    texts, everything = said(tmp_path)
    assert all("\nSyncTimeoutError: " in text for text in texts), everything
    # Each aborts the job after a second, or is ended by the kernel 10 s later, where the launcher can't be reached.
    assert until(lambda: not ranks_on(hosts), 40), everything
    assert until(lambda: process.poll() is not None, 90), "mpiexec still runs\n" + everything
    assert process.returncode != 0
