"""Checks before a collective: what one rank refuses, every rank refuses, and none is left waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from arraynorm import _fields
from arraynorm.typing import Communicator


@contextmanager
def refusal(comm: Communicator | None) -> Iterator[None]:
    """An exception in the body is taken to the peers' next round, so that it raises on every rank."""
    try:
        yield
    except Exception as error:
        if comm is not None:
            comm.agree(b"", error)
        raise


@contextmanager
def agreement(comm: Communicator | None) -> Iterator[dict[str, _fields.Field]]:
    """Run the checks of a call, then compare over the ranks the fields that the body has filled in.

    Without a communicator only the body runs.
    """
    fields: dict[str, _fields.Field] = {}
    with refusal(comm):
        yield fields
    if comm is not None:
        comm.agree(_fields.pack(fields))
