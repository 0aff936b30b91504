"""What a planted violation is."""

from __future__ import annotations

from typing import NamedTuple


class Violation(NamedTuple):
    """One edit of the package that breaks one behaviour of the contract and no other."""

    number: int
    """The behaviour."""
    what: str
    """How the package behaves with the edit."""
    file: str
    old: str
    """Stands exactly once in `file`."""
    new: str
