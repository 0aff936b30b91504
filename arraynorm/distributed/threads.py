"""A communicator over threads of one process: synchronized code without MPI, for tests."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from arraynorm import _check
from arraynorm.distributed._communicator import HostCommunicator
from arraynorm.distributed._errors import SyncTimeoutError
from arraynorm.distributed._rows import Row, Rows

T = TypeVar("T")


class PeerLeftError(SyncTimeoutError):
    """A collective can't complete: a rank has returned or raised, or did not come in time."""


class ThreadGroup:
    """The meeting place of `size` threads, and the communicators of its ranks."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self._changed = threading.Condition()
        self._brought: dict[int, Any] = {}
        self._round = 0
        self._result: list[Any] = []
        self._left: dict[int, str] = {}

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Bring a value, and receive those of all ranks in rank order."""
        with self._changed:
            number = self._round
            self._brought[rank] = value
            if len(self._brought) == self.size:
                # Nobody can complete the next round before every rank has taken this result.
                self._result = [self._brought[r] for r in range(self.size)]
                self._brought = {}
                self._round += 1
                self._changed.notify_all()
                return self._result
            arrived = self._changed.wait_for(lambda: self._round > number or self._left, self.timeout)
            if self._round > number:
                return self._result
            self._brought.pop(rank, None)  # a peer that comes later must not complete the round without this rank
            reasons = "; ".join(f"rank {r} {reason}" for r, reason in sorted(self._left.items()))
            waiting = reasons if arrived else f"not all ranks came within {self.timeout} s"
            raise PeerLeftError(f"rank {rank} waits in a collective that can't complete: {waiting}")

    def leave(self, rank: int, reason: str) -> None:
        """Rank `rank` makes no more calls: peers that wait for it, now or later, get an error."""
        with self._changed:
            self._left[rank] = reason
            self._changed.notify_all()


class ThreadCommunicator(HostCommunicator):
    """One rank of a group of threads; `arraynorm.testing.run_ranks` makes them."""

    def __init__(self, group: ThreadGroup, rank: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._group, self._rank = group, rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._group.size

    def _swap(self, row: Row) -> Rows:
        return Rows.of(self._exchange(row))

    def _maximum(self, a: Any) -> Any:
        return self._gather(a).max(axis=0)

    def _gather(self, a: Any) -> Any:
        return np.stack(self._exchange(a))

    def _sum(self, a: Any) -> Any:
        with np.errstate(all="ignore"):
            return self._gather(a).sum(axis=0)

    def _broadcast(self, a: Any, root: int) -> Any:
        return self._exchange(a)[root]

    def _exchange(self, a: Any) -> list[Any]:
        if self._broken:
            raise PeerLeftError(f"the communicator is broken since an earlier call: {self._broken}")
        return self._group.exchange(self._rank, a)

    def __repr__(self) -> str:
        return f"ThreadCommunicator(rank {self._rank} of {self.size})"


def run_ranks(
    n: int, function: Callable[[ThreadCommunicator], T], *, timeout: float = 60.0, return_exceptions: bool = False
) -> list[Any]:
    """Run `function(comm)` on `n` simulated ranks, each a thread of this process, and return their results.

    Parameters
    ----------
    n : int
        The number of ranks, >= 1.
    function : callable
        Called once per rank with that rank's communicator, which any `comm=` of the package accepts.
    timeout : float
        Seconds after which a rank that waits for peers in a collective gives up with a RuntimeError.
    return_exceptions : bool
        Whether a rank's exception is returned in its place.

    Returns
    -------
    list
        One result per rank, in rank order.

    Raises
    ------
    Exception
        The first rank's exception, unless it only says that a peer has left; then that peer's.

    Examples
    --------
    >>> import arraynorm as an, numpy as np
    >>> x = np.random.default_rng(0).normal(size=(10, 3))
    >>> shards = (x[:2], x[2:7], x[7:])
    >>> ys = an.testing.run_ranks(3, lambda comm: an.batch_norm(shards[comm.rank], comm=comm))
    >>> bool(np.allclose(np.concatenate(ys), an.batch_norm(x)))
    True
    """
    n = _check.integer("run_ranks", "n", n)
    if n < 1:
        raise ValueError(f"run_ranks: n must be >= 1, got {n}")
    group = ThreadGroup(n, timeout)
    outcomes: list[T | BaseException] = [RuntimeError("never started")] * n
    raised: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            outcomes[rank] = function(ThreadCommunicator(group, rank))
            group.leave(rank, "has returned")
        except BaseException as error:  # handed to the caller, whatever it is
            outcomes[rank] = raised[rank] = error
            group.leave(rank, f"raised {type(error).__name__}: {error}")

    # Each thread sees the caller's context (no_grad, kernels.only), as a rank of its own would.
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(run, rank)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [error for _, error in sorted(raised.items())]  # not what a function may have returned
    if errors and not return_exceptions:
        raise next((error for error in errors if not isinstance(error, PeerLeftError)), errors[0])
    return outcomes
