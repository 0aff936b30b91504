"""Short vectors of all ranks, sent from each to each by messages that MPI has set up beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Lengths of which the requests are kept: a forward and a backward for each number of channels in a network.
_LENGTHS = 64


class Swap(NamedTuple):
    """One exchange of rows of one length."""

    sends: list[Any]
    requests: list[Any]
    test: Callable[[], bool]
    rows: list[Any]


class DirectRows:
    """The rows of all ranks, in memory that stays where it is.

    Persistent requests cost half of a nonblocking collective's time, which MPI libraries set up anew for every call,
    and one latency, not log2(size). A rank receives into the whole row, so that what its peers send may be shorter than
    it expects, and longer, but never too long.

    Parameters
    ----------
    mpi : module
        mpi4py.MPI.
    comm : mpi4py.MPI.Intracomm
        Nobody else sends on it from rank to rank.
    capacity : int
        The greatest length of a row, the same on all ranks.
    """

    def __init__(self, mpi: Any, comm: Any, capacity: int) -> None:
        self._mpi, self._comm = mpi, comm
        rank, size = comm.Get_rank(), comm.Get_size()
        self._table = np.zeros((size, capacity))
        self.own = self._table[rank]
        self._peers = [(rank + distance) % size for distance in range(1, size)]
        self._receives = [comm.Recv_init([self._table[peer], mpi.DOUBLE], peer) for peer in self._peers]
        self._swaps: dict[int, Swap] = {}

    def start(self, length: int) -> Swap:
        """Begin to send the first `length` elements of `own`, and to receive what the others send."""
        swap = self._swaps.get(length) or self._set_up(length)
        self._mpi.Prequest.Startall(swap.requests)
        return swap

    def _set_up(self, length: int) -> Swap:
        if len(self._swaps) == _LENGTHS:
            _free(self._swaps.pop(next(iter(self._swaps))).sends)
        sends = [self._comm.Send_init([self.own[:length], self._mpi.DOUBLE], peer) for peer in self._peers]
        requests = self._receives + sends
        test = functools.partial(self._mpi.Prequest.Testall, requests)
        self._swaps[length] = Swap(sends, requests, test, list(self._table[:, :length]))
        return self._swaps[length]

    def free(self) -> None:
        """No more swaps are made."""
        _free(self._receives)
        for swap in self._swaps.values():
            _free(swap.sends)


def _free(requests: list[Any]) -> None:
    for request in requests:
        request.Free()
