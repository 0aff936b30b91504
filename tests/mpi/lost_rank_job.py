"""One rank of a job that loses rank 2: `mpiexec --with-ft ulfm -n 4 python lost_rank_job.py WHEN ENDING`.

WHEN is when it is killed; ENDING is what the others do with the error.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

import arraynorm as an
from arraynorm.distributed import MPICommunicator, SyncError, SyncRankFailedError

RANK = MPI.COMM_WORLD.rank
LOST = 2
SETTINGS = {"timeout": 20.0, "max_gathered_ranks": 2}  # sums, whose Reduce does not tell all ranks of a death
x = np.random.default_rng(RANK).standard_normal((4, 3))


def say(text):
    print(f"\nrank {RANK}: {text}", flush=True)


def die():
    if RANK == LOST:
        os.kill(os.getpid(), signal.SIGKILL)


def before(layer, comm):
    die()
    layer(x)


def between(layer, comm):
    y = layer(x)
    die()
    layer.backward(y)


def payload(layer, comm):
    comm.agree(b"")
    die()
    comm.merge_moments(4, x.mean(axis=0), x.var(axis=0))


def asleep(layer, comm):
    """The others wait when it dies."""
    if RANK == LOST:
        time.sleep(1)
    die()
    layer(x)


def refused(layer, comm):
    """No death: one rank's MPI refuses a call, and its peers must not wait for it."""
    comm.allreduce_sum(x)
    if RANK == LOST:
        comm._complete(comm._comm.Ibcast, np.zeros(1), root=99)
    layer(x)


def main(when, ending):
    comm = MPICommunicator(MPI.COMM_WORLD, **SETTINGS)
    layer = an.SyncBatchNorm(3, comm=comm)
    start = time.monotonic()
    try:
        with comm.step():
            globals()[when](layer, comm)
        say("noticed nothing")
    except SyncError as error:
        say(f"{type(error).__name__} {time.monotonic() - start:.1f}: {error}")
        if ending == "uncaught" or (ending == "one" and RANK == 0):
            raise
        if ending == "caught":
            return
    left = comm.shrink()
    try:
        comm.allreduce_sum(x)
        say("used the broken communicator")
    except SyncRankFailedError:
        pass
    assert all(getattr(left, name) == value for name, value in SETTINGS.items())
    layer.comm = left
    y = layer(x)
    whole = np.concatenate([np.random.default_rng(r).standard_normal((4, 3)) for r in range(4) if r != LOST])
    place = left.rank * 4
    assert np.allclose(y, an.batch_norm(whole, layer.weight, layer.bias)[place : place + 4], rtol=0, atol=1e-12)
    say(f"goes on as rank {left.rank} of {left.size}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
