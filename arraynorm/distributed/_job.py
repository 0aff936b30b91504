"""The MPI job that this process is a rank of: whether it outlives a rank, and how it is ended where it can't go on."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import signal
import sys
import time
from typing import Any

# Seconds before the job is aborted: the deadlines of the other ranks pass at about the same time, and they should
# come to say so.
_GRACE = 1.0

# Seconds between the ranks, where the first to abort should be the only one.
_APART = 0.3

# Seconds for MPI_Abort to end this process, before the kernel does.
_LAST_RESORT = 10

_unrecovered: list[object] = []
"""Broken communicators that were not shrunk: MPI_Finalize may wait for their missing ranks for ever."""


@functools.cache
def mpi() -> Any:
    from mpi4py import MPI

    return MPI


@functools.cache
def goes_on_without_a_rank() -> bool:
    """Whether this job outlives a rank: its MPI library has ULFM, and was told to use it."""
    MPI = mpi()
    if MPI.get_vendor()[0] == "Open MPI" and MPI.get_vendor()[1] >= (5,):
        # Without `--with-ft ulfm` it revokes, but Iagree never completes. It says which it is in an attribute, MPI_FT,
        # that mpi4py has no name for: in Open MPI's mpi.h it follows MPI_WIN_MODEL.
        flag = MPI.COMM_WORLD.Get_attr(MPI.WIN_MODEL + 1)
        return bool(flag) and ctypes.c_int.from_address(flag).value != 0
    probe = MPI.COMM_SELF.Dup()
    try:
        probe.Revoke()
    except NotImplementedError:
        return False
    finally:
        probe.Free()
    return True


def abort_at_exit(communicator: object) -> None:
    """End the job when this process exits, unless `communicator` is shrunk before."""
    _unrecovered.append(communicator)
    _register_abort()


def need_not_abort(communicator: object) -> None:
    """`communicator` was shrunk."""
    _unrecovered[:] = [other for other in _unrecovered if other is not communicator]


@functools.cache
def _register_abort() -> None:
    atexit.register(_abort)  # runs before mpi4py's own exit hook, whose MPI_Finalize would wait for ever


def _abort() -> None:
    if not _unrecovered:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_GRACE)
    if "PRTE_LAUNCHED" in os.environ:
        # The launcher of Open MPI 5.0.11 crashes (7 times of 50) or hangs (3 of 240) where a rank aborts while another
        # is in MPI_Finalize; a rank that is killed makes it end the job as well, and never (of 150) did.
        if not goes_on_without_a_rank():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        # A job that outlives a killed rank needs an abort, of one rank: of three at a time it hung once.
        time.sleep(_APART * min(mpi().COMM_WORLD.Get_rank(), 10))
    if hasattr(signal, "alarm"):
        # MPICH's Abort waits for a launcher that a rank on a host without network can't reach.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LAST_RESORT)
    mpi().COMM_WORLD.Abort(1)
