"""A communicator over mpi4py in which no wait is without an end."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from arraynorm import _array, _fields
from arraynorm.distributed._communicator import MAX_GATHERED_RANKS, HostCommunicator
from arraynorm.distributed._errors import SyncError, SyncRankFailedError, SyncTimeoutError
from arraynorm.distributed._job import abort_at_exit, goes_on_without_a_rank, need_not_abort
from arraynorm.distributed._job import mpi as _mpi
from arraynorm.distributed._rows import DirectRow, DirectRows, Rows
from arraynorm.distributed._staging import Staging, empty

# Polls without, then with a yield of the core, before the waiting rank sleeps between polls: a collective on one
# machine takes some 10 us, a poll 0.2 us. Who yields sooner, between two messages of one call, gives the core to any
# other process for a slice of some ms.
_SPINS, _YIELDS, _NAP = 500, 2500, 1e-4

# Where MPICH has more ranks than cores: who polls keeps its peer from running (Open MPI yields by itself then). With 4
# and 8 ranks on 2 cores a call takes half to a quarter of the time.
_SPINS_WHERE_CROWDED = 20

_DEFAULTS: dict[str, Any] = {
    "timeout": 1800.0,
    "validate": True,
    "max_gathered_ranks": MAX_GATHERED_RANKS,
    "cuda_aware": False,
}

# time.sleep(0) is no replacement where there is this: it sleeps for the timer's slack, some 60 us.
_yield_core = getattr(os, "sched_yield", lambda: time.sleep(0))

_abandoned: list[Any] = []
"""Requests that never completed, and their buffers, which MPI may still write to."""


def is_mpi4py(comm: object) -> bool:
    """Whether `comm` is an mpi4py object (asked without importing mpi4py)."""
    return _array.library(comm) == "mpi4py"


class MPICommunicator(HostCommunicator):
    """The ranks of an mpi4py communicator.

    The first one over `comm` is made collectively: `comm` is duplicated, so that our messages can't meet the caller's,
    the settings are compared, and the communicator is kept as an MPI attribute of `comm`. Later calls return that very
    one (MPI libraries run out of duplicates after some 2000). It is freed with `comm`.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    timeout : float
        Seconds from when this rank starts to wait for its peers to when it gives up with a SyncTimeoutError; 1800.
    validate : bool
        Whether the ranks' calls are compared before each payload (True); without it a difference is a hang or garbage.
    max_gathered_ranks : int
        Up to so many ranks the statistics are gathered in one message; beyond, they are summed in two.
    cuda_aware : bool
        Whether MPI may be given device memory (False): CuPy's statistics are then gathered from there, not from a
        pinned host copy. **An MPI without CUDA support crashes.** Not run on a GPU yet, either way.

    Raises
    ------
    TypeError
        `comm` is not an mpi4py intracommunicator.
    ValueError
        `timeout` is not a positive number; or there is a communicator over `comm` with other settings.
    SyncMismatchError
        The ranks' settings differ.

    Notes
    -----
    After a SyncTimeoutError, another SyncError for what MPI reports, or another exception within a call
    (KeyboardInterrupt, MemoryError), the communicator is broken: every later use raises at once. If a collective was
    left unfinished, for which MPI_Finalize would wait for ever, the process then ends the whole job, by MPI_Abort, when
    it exits, unless `shrink` has made a communicator of the ranks that are left.
    One thread uses a communicator at a time: for more, make one per `comm.Dup()`, in the same order on every rank.
    """

    timeout: float
    cuda_aware: bool
    _comm: Any = None

    def __new__(cls, comm: Any, **settings: Any) -> Self:
        if not _is_group_of_ranks(comm):
            raise TypeError(
                f"MPICommunicator: comm must be an mpi4py intracommunicator, got {comm!r} "
                "(pip install arraynorm[mpi] for mpi4py)"
            )
        found: Self | None = comm.Get_attr(_keyval())
        return super().__new__(cls) if found is None else found

    def __init__(
        self,
        comm: Any,
        *,
        timeout: float | None = None,
        validate: bool | None = None,
        max_gathered_ranks: int | None = None,
        cuda_aware: bool | None = None,
    ) -> None:
        settings = {
            "timeout": timeout,
            "validate": validate,
            "max_gathered_ranks": max_gathered_ranks,
            "cuda_aware": cuda_aware,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        if self._comm is None:
            self._create(comm, **(_DEFAULTS | given))
        for name, value in given.items():
            if value != getattr(self, name):
                raise ValueError(
                    f"MPICommunicator: {name} must be that of the communicator over comm that there is, "
                    f"{getattr(self, name)}, got {value}"
                )

    def _create(self, comm: Any, timeout: float, validate: bool, max_gathered_ranks: int, cuda_aware: bool) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"MPICommunicator: timeout must be a positive number of seconds, got {timeout!r}")
        self._set_up(comm, float(timeout), True, max_gathered_ranks, cuda_aware)
        creation = _fields.pack({"operation": "creating a communicator", "timeout": self.timeout})
        self._said = creation
        try:
            duplicate, request = comm.Idup()
            self._wait(request.Test, request, duplicate)
        except _mpi().Exception as error:
            raise self._failed(error) from error
        self._comm = duplicate
        settings = {"validate": int(validate), "max_gathered_ranks": max_gathered_ranks, "cuda_aware": int(cuda_aware)}
        self._agree_alone(creation + _fields.pack(settings))
        self.validate = validate
        comm.Set_attr(_keyval(), self)

    def _set_up(self, comm: Any, timeout: float, validate: bool, max_gathered_ranks: int, cuda_aware: bool) -> None:
        """Everything but `_comm`, which a communicator has once it may be used."""
        super().__init__(validate=validate, max_gathered_ranks=max_gathered_ranks)
        self.timeout, self.cuda_aware = timeout, cuda_aware
        self._staging = Staging(cuda_aware)
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._error: type[SyncError] = SyncTimeoutError
        self._rows: DirectRows | None = None
        self._spins = _SPINS_WHERE_CROWDED if _is_crowded(os.environ) else _SPINS

    @property
    def rank(self) -> int:
        return int(self._rank)

    @property
    def size(self) -> int:
        return int(self._size)

    def _row(self, length: int) -> DirectRow:
        if self._rows is None or self._broken:  # then peers may yet receive what the last row holds
            self._rows = DirectRows(_mpi(), self._usable())
        return self._rows[length]

    def _swap(self, row: Any) -> Rows:
        try:
            row.start()
            self._wait(row.is_complete, self._rows)
        except _mpi().Exception as error:
            raise self._failed(error) from error
        rows: Rows = row.rows
        return rows

    def _maximum(self, a: Any) -> Any:
        greatest = np.empty_like(a)
        self._complete(self._usable().Iallreduce, a, greatest, op=_mpi().MAX)
        return greatest

    def _gather(self, a: Any) -> Any:
        gathered = empty((self.size, *a.shape), a)
        self._complete(self._usable().Iallgather, a, gathered)
        return gathered

    def _sum(self, a: Any) -> Any:
        # Not an Allreduce: MPI recommends, but does not promise, that it gives all ranks the same bits.
        total = np.empty_like(a)
        self._complete(self._usable().Ireduce, a, total, op=_mpi().SUM, root=0)
        return self._broadcast(total, 0)

    def _broadcast(self, a: Any, root: int) -> Any:
        self._complete(self._usable().Ibcast, a, root=root)
        return a

    # -- waiting -----------------------------------------------------------------------------------------------

    def _usable(self) -> Any:
        if self._broken:
            raise self._error(f"the communicator is broken since an earlier call: {self._broken}")
        return self._comm

    def _complete(self, collective: Callable[..., Any], *buffers: Any, **options: Any) -> None:
        try:
            request = collective(*buffers, **options)
            self._wait(request.Test, request, *buffers)
        except _mpi().Exception as error:
            raise self._failed(error) from error

    def _wait(self, is_complete: Callable[[], bool], *held: Any) -> None:
        """Until requests are complete, or the deadline has passed; `held` are they and their buffers."""
        polls, deadline = 0, time.monotonic() + self.timeout
        try:
            while not is_complete():
                polls += 1
                if polls > self._spins:
                    if polls < _YIELDS:
                        _yield_core()
                    else:
                        time.sleep(_NAP)
                    if time.monotonic() > deadline:
                        self._give_up()
        except BaseException:  # the deadline, what MPI reports, or what a signal handler raises, as on Ctrl-C
            # Neither cancelled nor freed: MPI can't cancel a collective, and may yet write to the buffers.
            _abandoned.append((held, self._comm))
            abort_at_exit(self)
            raise

    def _give_up(self) -> None:
        self._broken = (
            f"rank {self.rank} of {self.size} waited {self.timeout:g} s in {self._call()}, and not all ranks came"
        )
        raise SyncTimeoutError(
            f"{self._broken}; one has failed, hangs or makes other calls. The job will be aborted when this process "
            "exits; run it by `python -m mpi4py` to have it aborted at a rank's first uncaught exception"
        )

    # -- ranks that die ----------------------------------------------------------------------------------------

    def _failed(self, error: Any) -> SyncError:
        """What MPI reports, in our words. The peers are to hear of it as well, for this rank makes no more calls."""
        died = self._death_is_known(error)
        if self._comm is not None:
            with contextlib.suppress(NotImplementedError):
                self._comm.Revoke()
        self._error = SyncRankFailedError if died else SyncError
        self._broken = f"rank {self.rank} of {self.size}: MPI reports an error in {self._call()}: {error}"
        abort_at_exit(self)
        end = "the job will be aborted when this process exits"
        if died and goes_on_without_a_rank():
            end = f"go on with those that are left by `comm = comm.shrink()`, or {end}"
        return self._error(f"{self._broken}; {'a rank has died or given up: ' if died else ''}{end}")

    def _death_is_known(self, error: Any) -> bool:
        """Whether an error of MPI is about a rank that has died, or a peer that knows of one."""
        MPI = _mpi()
        # mpi4py gives codes that the MPI library lacks the value of ERR_UNKNOWN
        if error.Get_error_class() in {MPI.ERR_PROC_FAILED, MPI.ERR_REVOKED} - {MPI.ERR_UNKNOWN}:
            return True
        # Open MPI 5.0.11 reports ERR_OTHER where death and revocation come at the same time.
        return self._comm is not None and (self._comm.Is_revoked() or self._comm.Get_failed().Get_size() > 0)

    def shrink(self) -> MPICommunicator:
        """The communicator of the ranks that are left, in their order, with the same settings.

        To be called by all of them once this one has raised a SyncError on any: the others raise at their next call,
        or in the one in which they wait. It says nothing of the training: agree on the step to go on from, and use
        `broadcast_state`.

        Raises
        ------
        RuntimeError
            The MPI library has no User-Level Failure Mitigation (ULFM), or does not use it in this job. Open MPI does
            under `mpiexec --with-ft ulfm`; other launchers end the job when a rank dies. Nothing is changed.
        SyncTimeoutError
            A rank that has not died did not come within `timeout`.

        References
        ----------
        Bland et al., "Post-failure recovery of MPI communication capability: Design and rationale", 2013.
        """
        MPI = _mpi()
        if not goes_on_without_a_rank():
            raise RuntimeError(
                f"MPICommunicator.shrink: {MPI.get_vendor()[0]}, as it was started, can't go on without a rank; "
                "Open MPI can, started by `mpiexec --with-ft ulfm`"
            )
        self._said = _fields.pack({"operation": "shrinking"})
        self._comm.Revoke()
        # Shrink waits for all who live, and Ishrink fails with ERR_INTERN in Open MPI 5.0.11: so they are awaited here.
        everyone = np.ones(1, dtype=np.intc)
        try:
            request = self._comm.Iagree(everyone)
            self._wait(request.Test, request, everyone)
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_PROC_FAILED:  # this one says that all came but the dead
                raise self._failed(error) from error
        survivors = self._comm.Shrink()
        if not self._broken:
            self._broken, self._error = "it was shrunk", SyncError
        need_not_abort(self)
        shrunk = object.__new__(type(self))  # nobody else has its MPI communicator: it need not be a duplicate
        shrunk._set_up(survivors, self.timeout, self.validate, self.max_gathered_ranks, self.cuda_aware)
        shrunk._comm = survivors
        return shrunk

    def __repr__(self) -> str:
        return f"MPICommunicator(rank {self.rank} of {self.size})"


def _is_crowded(environment: Mapping[str, str]) -> bool:
    """Whether MPICH's launcher, Hydra, has started more ranks than there are cores on this host."""
    ranks = environment.get("MPI_LOCALNRANKS", "")
    return ranks.isdigit() and int(ranks) > (os.cpu_count() or 1)


def _is_group_of_ranks(comm: Any) -> bool:
    """Whether `comm` is an mpi4py intracommunicator, and not the null one that Split gives to whom it leaves out."""
    return is_mpi4py(comm) and isinstance(comm, _mpi().Intracomm) and comm != _mpi().COMM_NULL


def wrapped(comm: Any) -> MPICommunicator:
    """The communicator over a raw one that a layer was given."""
    is_new = _is_group_of_ranks(comm) and comm.Get_attr(_keyval()) is None
    if is_new and threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "a raw mpi4py communicator can't be wrapped in a thread, where the order of such calls is left to chance: "
            "make one arraynorm.distributed.MPICommunicator(comm.Dup()) per thread, in the same order on all ranks"
        )
    return MPICommunicator(comm)


@functools.cache
def _keyval() -> int:
    return int(_mpi().Comm.Create_keyval(delete_fn=_free))


def _free(comm: Any, keyval: int, communicator: MPICommunicator) -> None:
    """The raw communicator is being freed, by all its ranks: so is the duplicate."""
    if not communicator._broken:
        if communicator._rows is not None:
            communicator._rows.free()
        communicator._comm.Free()
