"""Docstrings of classes that differ from their base in a check of the rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

C = TypeVar("C", bound=type)


def documented_as(base: type) -> Callable[[C], C]:
    """Class decorator: after the class's own line come the parameters, errors and notes of `base`."""

    def document(cls: C) -> C:
        if cls.__doc__ and base.__doc__:  # python -OO has none
            cls.__doc__ += "\n" + base.__doc__.partition("\n")[2]
        return cls

    return document
