"""Whether layers keep what a backward needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_grad_enabled: ContextVar[bool] = ContextVar("arraynorm_grad_enabled", default=True)


def grad_enabled() -> bool:
    """Whether this context is outside `no_grad`."""
    return _grad_enabled.get()


@contextmanager
def no_grad() -> Iterator[None]:
    """In this context layers keep no cache, so there is nothing to call backward on.

    Nests. Enter it inside each thread: the threads of a pool do not inherit it.
    """
    token = _grad_enabled.set(False)
    try:
        yield
    finally:
        _grad_enabled.reset(token)
