"""One rank of a training over two hosts: `python two_hosts_job.py FOLDER CHANNELS STEPS PAUSE TIMEOUT`.

Each rank writes what it sees to FOLDER/rank-N, for a host that is cut off can't send it.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

import arraynorm as an
from arraynorm.distributed import MPICommunicator, SyncError, allreduce_gradients

SAMPLES = (3, 0, 5, 1)
RANK = MPI.COMM_WORLD.rank
MINE = slice(sum(SAMPLES[:RANK]), sum(SAMPLES[: RANK + 1]))


def main(folder, channels, steps, pause, timeout):
    log = (folder / f"rank-{RANK}").open("w", buffering=1)
    print(f"host {socket.gethostname()}", file=log)
    comm = MPICommunicator(MPI.COMM_WORLD, timeout=timeout)
    sync, whole = an.SyncBatchNorm(channels, comm=comm, dtype=np.float64), an.BatchNorm(channels, dtype=np.float64)
    rng = np.random.default_rng(0)
    try:
        for step in range(steps):
            x, dy = 10 + rng.standard_normal((2, sum(SAMPLES), channels))
            with comm.step():
                y, dx = sync(x[MINE]), sync.backward(dy[MINE])
                allreduce_gradients(sync, comm)
            # well-conditioned data: float64 rounding is some 1e-14
            assert np.allclose(y, whole(x)[MINE], rtol=0, atol=1e-12)
            assert np.allclose(dx, whole.backward(dy)[MINE], rtol=0, atol=1e-12)
            for layer in (sync, whole):
                for _, parameter, gradient in layer.named_gradients():
                    parameter -= 0.01 * gradient
                layer.zero_grad()
            for name, value in whole.state_dict().items():
                assert np.allclose(sync.state_dict()[name], value, rtol=0, atol=1e-11), name
            print(f"step {step}", file=log)
            time.sleep(pause)
    except SyncError as error:
        print(f"{type(error).__name__}: {error}", file=log)
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
