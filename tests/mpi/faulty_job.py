"""One rank of a job in which something goes wrong: faulty_job.py FAULT ENDING STEP ODD TIMEOUT FOLDER, under mpiexec.

FAULT is a function of this file. ENDING says what the program does with the error: nothing ("uncaught", and "mpi4py"
where `python -m mpi4py` runs it), go on to its normal end ("caught") or "exit". STEP is "step" where the fault happens
within `comm.step()`, else "alone". ODD is the rank at fault, TIMEOUT the communicator's. What a rank says goes to
FOLDER/rank-N too, whatever the launcher loses.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

import arraynorm as an
from arraynorm.distributed import MPICommunicator, SyncError, SyncTimeoutError

FAULT, ENDING, STEP, ODD, TIMEOUT, FOLDER = sys.argv[1:]
RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
IS_ODD = int(ODD) == RANK
IS_LAST_TO_COME = (int(ODD) + 1) % SIZE == RANK
LATE = 2.0  # seconds that the others spend in a collective before the last one comes to it
x = np.random.default_rng(RANK).standard_normal((4, 3))
layers = []

# Where statistics are summed, which else begins with 17 ranks, an agreement round is a message of its own.
SUMMED = ("exception_after_round", "killed_in_a_round", "killed_in_a_sum")


def sync(comm, channels=3, **settings):
    layers.append(an.SyncBatchNorm(channels, comm=comm, **settings))
    return layers[-1]


def say(text):
    with Path(FOLDER, f"rank-{RANK}").open("a") as file:
        file.write(f"{text}\n")
    print(f"\nrank {RANK}: {text}", flush=True)


# -- the ranks' calls differ ---------------------------------------------------------------------------------------


def channels(comm):
    sync(comm, 2 + RANK)(np.ones((4, 2 + RANK)))


def dtype(comm):
    sync(comm)(x.astype(np.float32 if IS_ODD else np.float64))


def mode(comm):
    first, second = sync(comm), sync(comm)
    first.train(not IS_ODD)
    second(first(x))


def eps(comm):
    sync(comm, eps=1e-3 if IS_ODD else 1e-5)(x)


def momentum(comm):
    sync(comm, momentum=0.5 if IS_ODD else 0.1)(x)


def affine(comm):
    sync(comm, affine=not IS_ODD)(x)


def call_order(comm):
    first, second = sync(comm), sync(comm)
    second(first(x))
    if IS_ODD:
        first.backward(second.backward(x)), second(first(x))
    else:
        second(first(x)), first.backward(second.backward(x))


def swapped_layers(comm):
    pair = sync(comm), sync(comm)
    for layer in reversed(pair) if IS_ODD else pair:
        layer(x)


def skipped_last_call(comm):
    layer = sync(comm)
    y = layer(x)
    if not IS_ODD:
        layer.backward(y)


def extra_call(comm):
    layer = sync(comm)
    for _ in range(1 + IS_ODD):
        layer(x)


def eval_on_one_rank(comm):
    sync(comm).train(not IS_ODD)(x)


# -- one rank's exception ------------------------------------------------------------------------------------------


def refused_x(comm):
    sync(comm)(x[:, :2] if IS_ODD else x)


def refused_dy(comm):
    layer = sync(comm)
    y = layer(x)
    layer.backward(y[1:] if IS_ODD else y)


def exception_before(comm):
    layer = sync(comm)
    if IS_ODD:
        raise KeyError("planted")
    layer(x)


def exception_between(comm):
    layer = sync(comm)
    y = layer(x)
    if IS_ODD:
        raise KeyError("planted")
    layer.backward(y)


def exception_inside(comm):
    """Before the message that carries what is said of the call: as where the memory for the statistics is missing."""

    def fail(*moments):
        del comm.merge_moments
        raise MemoryError("planted")

    if IS_ODD:
        comm.merge_moments = fail
    sync(comm)(x)


exception_after_round = exception_inside  # for the round comes first where statistics are summed


def interrupted(comm):
    """A signal handler raises while the rank waits in a collective."""

    def handle(number, frame):
        if not is_inside("merge_moments", frame):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise InterruptedError("planted")

    if IS_ODD:
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    time.sleep(LATE * (not IS_ODD))
    sync(comm)(x)


def two_threads(comm):
    first, second = sync(comm), sync(comm)
    if IS_ODD:
        thread = threading.Thread(target=first, args=(x,))
        thread.start()
        wait_until_inside("merge_moments", thread.ident)
        try:
            second(x)
        finally:
            Path(FOLDER, "refused").touch()
            thread.join()
    else:
        while IS_LAST_TO_COME and not Path(FOLDER, "refused").exists():
            time.sleep(0.01)
        first(x)
        second(x)


# -- a rank that is not there --------------------------------------------------------------------------------------


def late(comm):
    time.sleep(2 * float(TIMEOUT) * IS_ODD)
    sync(comm)(x)


def killed_before(comm):
    layer = sync(comm)
    layer(x)
    if IS_ODD:
        os.kill(os.getpid(), signal.SIGKILL)
    layer(x)


def killed_in_a_round(comm):
    kill_inside("agree")
    time.sleep(LATE * IS_LAST_TO_COME)
    sync(comm)(x)


def killed_in_a_payload(comm):
    kill_inside("merge_moments")
    if IS_LAST_TO_COME:
        merge = comm.merge_moments
        comm.merge_moments = lambda *moments: (time.sleep(LATE), merge(*moments))[1]
    sync(comm)(x)


killed_in_a_sum = killed_in_a_payload


def kill_inside(function):
    """Kill the rank at fault once its main thread waits for the last one to come."""

    def kill():
        wait_until_inside(function, threading.main_thread().ident)
        say(f"killed inside {function}")
        os.kill(os.getpid(), signal.SIGKILL)

    if IS_ODD:
        threading.Thread(target=kill, daemon=True).start()


def is_inside(function, frame):
    """Whether the innermost frame is the communicator's, in a call of `function`."""
    if frame is None or not frame.f_code.co_filename.endswith(os.path.join("distributed", "mpi.py")):
        return False
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


def wait_until_inside(function, thread):
    """Until the thread has been seen in a collective of `function` for some time, without a look elsewhere."""
    seen = 0
    while seen < 20:
        seen = seen + 1 if is_inside(function, sys._current_frames().get(thread)) else 0
        time.sleep(0.01)


# -- no fault ------------------------------------------------------------------------------------------------------


def nan(comm):
    layer = sync(comm)
    y = layer(np.where([False, IS_ODD, False], np.nan, x))
    channels = [np.flatnonzero(test(np.isnan(y), axis=0)).tolist() for test in (np.any, np.all)]
    say(f"channels with a NaN and with nothing else: {channels}; {state()}")


def state():
    """What a silent difference would show in: the running statistics of the layers that have moved."""
    moved = [layer for layer in layers if layer.num_batches_tracked]
    buffers = b"".join(getattr(layer, name).tobytes() for layer in moved for name in ("running_mean", "running_var"))
    counts = [int(layer.num_batches_tracked) for layer in layers]
    return f"forwards {counts}, running statistics {hashlib.sha256(buffers).hexdigest()[:8]}"


def use_again(comm):
    """What a rank that goes on after an error of all ranks finds."""
    try:
        layer = sync(comm)
        layer.backward(layer(x))
        say(f"used again; {state()}")
    except SyncTimeoutError as error:
        say(f"used again: {type(error).__name__}: {error}")


def main():
    MPI.COMM_WORLD.Barrier()  # a rank that was slow to start is not the fault that is looked for
    name, version = MPI.get_vendor()
    say(f"began at {time.time()} with {name} {'.'.join(map(str, version))}")
    settings = {"max_gathered_ranks": 1} if FAULT in SUMMED else {}
    comm = MPICommunicator(MPI.COMM_WORLD, timeout=float(TIMEOUT), **settings)
    try:
        with comm.step() if STEP == "step" else contextlib.nullcontext():
            globals()[FAULT](comm)
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        if ENDING in ("uncaught", "mpi4py"):
            raise
        if ENDING == "exit":
            sys.exit(3)
        if isinstance(error, SyncError):
            use_again(comm)
    say("came to its end")


if __name__ == "__main__":
    main()
