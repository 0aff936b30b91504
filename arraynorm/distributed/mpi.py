"""A communicator over mpi4py."""

from __future__ import annotations

from typing import Any

import numpy as np

from arraynorm import _array
from arraynorm.distributed._communicator import HostCommunicator
from arraynorm.distributed._moments import Float64Array


def is_mpi4py(comm: object) -> bool:
    """Whether `comm` is an mpi4py object (asked without importing mpi4py)."""
    return _array.library(comm) == "mpi4py"


class MPICommunicator(HostCommunicator):
    """The ranks of an mpi4py communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Duplicated once, so that our messages can't meet the caller's; the duplicate is kept as an MPI attribute of
        `comm` and shared by every MPICommunicator over it. Creating the first one is therefore collective.

    Raises
    ------
    TypeError
        `comm` is not an mpi4py intracommunicator.
    """

    def __init__(self, comm: Any) -> None:
        if not _is_group_of_ranks(comm):
            raise TypeError(
                f"MPICommunicator: comm must be an mpi4py intracommunicator, got {comm!r} "
                "(pip install arraynorm[mpi] for mpi4py)"
            )
        self._comm = _duplicate(comm)

    @property
    def rank(self) -> int:
        return int(self._comm.Get_rank())

    @property
    def size(self) -> int:
        return int(self._comm.Get_size())

    def _allgather(self, payload: Float64Array) -> Float64Array:
        gathered = np.empty((self.size, payload.shape[0]))
        self._comm.Allgather(payload, gathered)
        return gathered

    def _allgather_bytes(self, message: bytes) -> list[bytes]:
        messages: list[bytes] = self._comm.allgather(message)
        return messages

    def __repr__(self) -> str:
        return f"MPICommunicator(rank {self.rank} of {self.size})"


def _is_group_of_ranks(comm: Any) -> bool:
    """Whether `comm` is an mpi4py intracommunicator, and not the null one that Split gives to whom it leaves out."""
    if not is_mpi4py(comm):
        return False
    from mpi4py import MPI

    return isinstance(comm, MPI.Intracomm) and comm != MPI.COMM_NULL


_keyvals: list[int] = []


def _duplicate(comm: Any) -> Any:
    """The duplicate of `comm`, made at the first call: MPI libraries run out of communicators after some 2000."""
    from mpi4py import MPI

    if not _keyvals:
        _keyvals.append(MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, duplicate: duplicate.Free()))
    duplicate = comm.Get_attr(_keyvals[0])
    if duplicate is None:
        duplicate = comm.Dup()
        comm.Set_attr(_keyvals[0], duplicate)
    return duplicate
