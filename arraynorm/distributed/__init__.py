"""Communicators: groups of ranks that share batch statistics.

`MPICommunicator` over mpi4py, `ThreadCommunicator` over threads of one process, `SELF` for one rank alone. Nothing
here imports mpi4py before it is asked for.
"""

from arraynorm.distributed._communicator import SELF
from arraynorm.distributed._errors import SyncError, SyncMismatchError, SyncRankFailedError, SyncTimeoutError
from arraynorm.distributed._resolve import as_communicator, layer_numbers, world
from arraynorm.distributed.data_parallel import allreduce_gradients, broadcast_state
from arraynorm.distributed.mpi import MPICommunicator
from arraynorm.distributed.threads import ThreadCommunicator

__all__ = [
    "SELF",
    "MPICommunicator",
    "SyncError",
    "SyncMismatchError",
    "SyncRankFailedError",
    "SyncTimeoutError",
    "ThreadCommunicator",
    "allreduce_gradients",
    "as_communicator",
    "broadcast_state",
    "layer_numbers",
    "world",
]
