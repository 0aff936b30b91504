"""Rows: what all ranks say of a call and their payloads, by messages from each to each that MPI has set up before."""

from __future__ import annotations

import functools
from collections.abc import Callable
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


class Row(NamedTuple):
    """One rank's row, and views of its parts: to make them takes as long as to work on them."""

    whole: Any
    head: Any
    payload: Any
    n: Any
    mean: Any
    m2: Any

    @classmethod
    def cut(cls, whole: Any) -> Row:
        return cls.of(whole[HEAD:])._replace(whole=whole, head=whole[:HEAD])

    @classmethod
    def of(cls, payload: Any) -> Row:
        """What came without a head."""
        channels = len(payload) // 2  # where it holds moments
        return cls(None, None, payload, payload[:1], payload[1 : 1 + channels], payload[1 + channels :])


class Swap(NamedTuple):
    """One exchange of rows of one length."""

    sends: list[Any]
    requests: list[Any]
    is_complete: Callable[[], bool]
    rows: list[Row]


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
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi, self._comm = mpi, comm
        rank, size = comm.Get_rank(), comm.Get_size()
        self._table = np.zeros((size, row_capacity(size)))
        self._rank = rank
        self._peers = [(rank + distance) % size for distance in range(1, size)]
        self._receives = [comm.Recv_init([self._table[peer], mpi.DOUBLE], peer) for peer in self._peers]
        self._swaps: dict[int, Swap] = {}

    def own(self, length: int) -> Row:
        """This rank's row, to be written before it is sent."""
        row: Row = self._of(length).rows[self._rank]
        return row

    def start(self, length: int) -> Swap:
        """Begin to send this rank's row of `length` elements, and to receive the others'."""
        swap = self._of(length)
        self._mpi.Prequest.Startall(swap.requests)
        return swap

    def _of(self, length: int) -> Swap:
        return self._swaps.get(length) or self._set_up(length)

    def _set_up(self, length: int) -> Swap:
        if len(self._swaps) == _LENGTHS:
            _free(self._swaps.pop(next(iter(self._swaps))).sends)
        own = [self._table[self._rank, :length], self._mpi.DOUBLE]
        sends = [self._comm.Send_init(own, peer) for peer in self._peers]
        requests = self._receives + sends
        is_complete = functools.partial(self._mpi.Prequest.Testall, requests)
        self._swaps[length] = Swap(sends, requests, is_complete, list(map(Row.cut, self._table[:, :length])))
        return self._swaps[length]

    def free(self) -> None:
        """No more swaps are made."""
        _free(self._receives)
        for swap in self._swaps.values():
            _free(swap.sends)


def _free(requests: list[Any]) -> None:
    for request in requests:
        request.Free()
