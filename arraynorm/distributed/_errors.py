"""What goes wrong between ranks."""

from __future__ import annotations


class SyncError(RuntimeError):
    """A collective call of this package failed."""


class SyncMismatchError(SyncError):
    """The ranks' calls differ, or one of them was refused; the same error is raised on every rank."""


class SyncRankFailedError(SyncError):
    """MPI reports that a rank has died, or a peer to which it was reported has revoked the communicator.

    The communicator can't be used any more; `MPICommunicator.shrink` makes one of the ranks that are left.
    """


class SyncTimeoutError(SyncError):
    """A rank did not come to a collective within the deadline, or has left one; the communicator is broken."""
