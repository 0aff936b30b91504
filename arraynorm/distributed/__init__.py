"""Communicators: groups of ranks that share batch statistics.

`MPICommunicator` over mpi4py, `ThreadCommunicator` over threads of one process, `SELF` for one rank alone. Nothing
here imports mpi4py before it is asked for.
"""

from arraynorm.distributed._communicator import SELF, SyncMismatchError
from arraynorm.distributed._resolve import as_communicator, world
from arraynorm.distributed.mpi import MPICommunicator
from arraynorm.distributed.threads import ThreadCommunicator

__all__ = ["SELF", "MPICommunicator", "SyncMismatchError", "ThreadCommunicator", "as_communicator", "world"]
