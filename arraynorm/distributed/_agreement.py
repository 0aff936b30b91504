"""The agreement: one small message that finds out whether all ranks are about to do the same.

Where payloads are gathered, each carries what its rank says of the call at its head, so that one message does both; it
may have another length on each rank. Where they are summed, a round of its own comes first: one MAX over what the ranks
say and its negative. Only if they differ does one more message carry all of it, to be put into words.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from arraynorm import _fields
from arraynorm.distributed._errors import SyncMismatchError

Int64Array = np.ndarray[Any, np.dtype[np.int64]]
ByteArray = np.ndarray[Any, np.dtype[np.uint8]]

HEAD = 4
"""Elements at the head of a row: the hash of the call, the round, the step, the elements that follow."""

_FAILED = -1  # no hash: those are >= 0

# Of the message that explains, per rank. It has one size, for ranks that disagree can't agree on another.
_LENGTH = 2048
_CALL, _ERROR = b"c", b"e"
_LISTED = 8  # ranks that are named one by one
_IDENTITY = ("operation", "layer", "name", "index")
_CONSEQUENCE = "elements"  # of the payload: follows from the rest


def head(fields: bytes, error: BaseException | None, number: int, step: int, elements: int) -> tuple[int, ...]:
    """What a rank says of its call at the head of the row that it is about to send."""
    return (_hash(fields) if error is None else _FAILED, number, step, elements)


def agree_by_heads(heads: Sequence[memoryview], error: BaseException | None) -> bool:
    """Whether all ranks have sent the same head, and this one has not failed."""
    return error is None and b"".join(heads) == bytes(heads[0]) * len(heads)


def agree_by_maximum(
    fields: bytes,
    error: BaseException | None,
    number: int,
    step: int,
    maximum: Callable[[Int64Array], Int64Array],
) -> bool:
    """The same by the elementwise maximum of a vector over all ranks."""
    said = np.array([_hash(fields), number, step], dtype=np.int64)
    greatest = maximum(np.concatenate((said, -said, [error is not None]))).tolist()
    return greatest[:3] == [-least for least in greatest[3:6]] and not greatest[6]


def disagreement(
    fields: bytes,
    numbers: Mapping[str, int],
    error: BaseException | None,
    gather: Callable[[ByteArray], ByteArray],
) -> SyncMismatchError:
    """The same error on every rank, which says who holds what.

    Parameters
    ----------
    fields : bytes
        As `_fields.pack` makes them.
    numbers : mapping
        More fields, which change with every call.
    error : exception or None
        Why this rank can't make its call.
    gather : callable
        All ranks' vectors (K,) -> (ranks, K).
    """
    if error is None:
        said = _CALL + _fields.pack(numbers) + fields
    else:
        said = _ERROR + f"{type(error).__name__}: {error}".encode()
    everything = gather(_padded(said))
    return SyncMismatchError(_explanation([row.tobytes().rstrip(b"\0") for row in everything]))


@functools.lru_cache(maxsize=1024)  # a layer says the same in every step
def _hash(fields: bytes) -> int:
    """52 bits, which float64 holds: two different calls meet with a chance of 2e-16."""
    return int.from_bytes(hashlib.blake2b(fields, digest_size=8).digest(), "little") >> 12


def _padded(said: bytes) -> ByteArray:
    # A trailing mark keeps zero bytes at the end of a number from being taken for padding.
    cut = said[: _LENGTH - 1] + b"."
    return np.frombuffer(cut.ljust(_LENGTH, b"\0"), dtype=np.uint8).copy()


def _explanation(said: Sequence[bytes]) -> str:
    """The same text on every rank: whose call was refused, or what differs and who holds what."""
    errors = [
        f"rank {rank}: {text[1:-1].decode(errors='replace')}" for rank, text in enumerate(said) if text[:1] == _ERROR
    ]
    if errors:
        return "a rank refused its call; " + "; ".join(errors)
    calls = [_fields.unpack(text[1:-1]) for text in said]
    names = dict.fromkeys(name for call in calls for name in call)
    differing = [name for name in names if len({call.get(name) for call in calls}) > 1]
    # Where the ranks are about to do different things, the settings of those things say nothing.
    differing = [name for name in differing if name in _IDENTITY] or differing
    differing = [name for name in differing if name != _CONSEQUENCE] or differing
    return "the ranks' calls differ: " + "; ".join(
        f"{name}: {_who_holds_what([call.get(name, 'absent') for call in calls])}" for name in differing
    )


def _who_holds_what(values: Sequence[_fields.Field]) -> str:
    """ "4 on rank 0, 8 on rank 1"; for many ranks "4 on 15 ranks from rank 0, 8 on 1 ranks from rank 3"."""
    if len(values) <= _LISTED:
        return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
    ranks: dict[_fields.Field, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {len(held)} ranks from rank {held[0]}" for value, held in ranks.items())
