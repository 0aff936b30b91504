"""Rows: what all ranks say of a call and their payloads, by messages from each to each that MPI has set up before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from arraynorm.distributed._agreement import HEAD

# Elements of a row, and of the rows of all ranks (2 MiB): longer payloads are gathered after a round of their own.
_ROW, _ROWS = 2**14, 2**18

# Lengths of which the requests are kept: a forward and a backward for each number of channels in a network.
_LENGTHS = 64


def row_capacity(size: int) -> int:
    """The greatest length of a row, the same on every rank."""
    return max(HEAD, min(_ROW, _ROWS // size))


class Rows(NamedTuple):
    """The parts of the rows of all ranks.

    Until the heads were found to be equal a payload may have any length, or end in what an earlier row has left.
    """

    heads: list[memoryview]
    payloads: list[Any]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        return cls([row.head for row in rows], [row.payload for row in rows])


class Row:
    """One rank's row, and its parts: to cut them takes as long as to work on them."""

    __slots__ = ("head", "payload", "whole")

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.head = memoryview(whole[:HEAD])
        self.payload = whole[HEAD:]


class DirectRow(Row):
    """This rank's row of one length, with what it takes to exchange it for those of the others."""

    __slots__ = ("is_complete", "rows", "sends", "start")

    start: Callable[[], None]
    is_complete: Callable[[], bool]
    rows: Rows
    sends: list[Any]


class DirectRows(dict[int, DirectRow]):
    """Length -> this rank's row of that length; those of all ranks lie in memory that stays where it is.

    Persistent requests cost half of a nonblocking collective's time, which MPI libraries set up anew for every call,
    and one latency, not log2(size). A rank receives into the whole row, so that what its peers send may be shorter than
    it expects, and longer, but never too long.

    Parameters
    ----------
    mpi : module
        mpi4py.MPI.
    comm : mpi4py.MPI.Intracomm
        Nobody else sends on it from rank to rank.
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        super().__init__()
        self._mpi, self._comm = mpi, comm
        rank, size = comm.Get_rank(), comm.Get_size()
        self._table = np.zeros((size, row_capacity(size)))
        self._rank = rank
        self._peers = [(rank + distance) % size for distance in range(1, size)]
        self._receives = [comm.Recv_init([self._table[peer], mpi.DOUBLE], peer) for peer in self._peers]

    def __missing__(self, length: int) -> DirectRow:
        if len(self) == _LENGTHS:
            _free(self.pop(next(iter(self))).sends)
        own = DirectRow(self._table[self._rank, :length])
        own.sends = [self._comm.Send_init([own.whole, self._mpi.DOUBLE], peer) for peer in self._peers]
        requests = self._receives + own.sends
        own.start = functools.partial(self._mpi.Prequest.Startall, requests)
        own.is_complete = functools.partial(self._mpi.Prequest.Testall, requests)
        own.rows = Rows.of([Row(whole) for whole in self._table[:, :length]])
        self[length] = own
        return own

    def free(self) -> None:
        """No more rows are exchanged."""
        _free(self._receives)
        for row in self.values():
            _free(row.sends)


def _free(requests: list[Any]) -> None:
    for request in requests:
        request.Free()
