"""One rank of a job in which something goes wrong: `mpiexec -n 3 python faulty_job.py FAULT ENDING STEP`.

FAULT is a function of this file; ENDING says what the program does with the error: nothing ("uncaught"), go on to its
normal end ("caught") or "exit"; STEP is "step" where the fault happens within `comm.step()`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

import arraynorm as an
from arraynorm.distributed import MPICommunicator

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
IS_ODD = RANK == SIZE - 1
TIMEOUT = 4.0
x = np.random.default_rng(RANK).standard_normal((4, 3))


def channels(layer):
    layer(x[:, :2] if IS_ODD else x)


def skipped_last_call(layer):
    y = layer(x)
    if not IS_ODD:
        layer.backward(y)


def extra_call(layer):
    for _ in range(1 + IS_ODD):
        layer(x)


def exception_between(layer):
    y = layer(x)
    if IS_ODD:
        raise KeyError("planted")
    layer.backward(y)


def eval_on_one_rank(layer):
    layer.train(not IS_ODD)(x)


def late(layer):
    time.sleep(2 * TIMEOUT * IS_ODD)
    layer(x)


def killed(layer):
    layer(x)
    if IS_ODD:
        os.kill(os.getpid(), signal.SIGKILL)
    layer(x)


def main(fault, ending, step):
    MPI.COMM_WORLD.Barrier()  # a rank that was slow to start is not the fault that is looked for
    comm = MPICommunicator(MPI.COMM_WORLD, timeout=TIMEOUT)
    layer = an.SyncBatchNorm(3, comm=comm)
    try:
        with comm.step() if step else contextlib.nullcontext():
            globals()[fault](layer)
    except Exception as error:
        print(f"\nrank {RANK}: {type(error).__name__}: {error}", flush=True)
        if ending == "uncaught":
            raise
        if ending == "exit":
            sys.exit(3)
    print(f"\nrank {RANK}: came to its end", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:] == ["step"])
