"""The agreement round: one small message that finds out whether all ranks are about to do the same.

Each rank hashes what it says of its call and takes part in one MAX over [h, -h, failed]. If all say the same, the
greatest hash is also the least. Only if not does a second message carry what they said, to be put into words.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from arraynorm import _fields
from arraynorm.distributed._errors import SyncMismatchError

Int64Array = np.ndarray[Any, np.dtype[np.int64]]
ByteArray = np.ndarray[Any, np.dtype[np.uint8]]

# Of the message that explains, per rank. It has one size, for ranks that disagree can't agree on another.
_LENGTH = 2048
_CALL, _ERROR = b"c", b"e"
_LISTED = 8  # ranks that are named one by one
_IDENTITY = ("operation", "layer", "name", "index")


def agree(
    fields: bytes,
    numbers: Mapping[str, int],
    error: BaseException | None,
    *,
    maximum: Callable[[Int64Array], Int64Array],
    gather: Callable[[ByteArray], ByteArray],
) -> None:
    """Compare `fields` and `numbers` over all ranks; raise SyncMismatchError on every one if they differ.

    Likewise if a rank has an `error`.

    Parameters
    ----------
    fields : bytes
        As `_fields.pack` makes them.
    numbers : mapping
        More fields, which change with every call.
    error : exception or None
        Why this rank can't make its call.
    maximum, gather : callable
        The collectives: elementwise maximum of a vector over all ranks; all ranks' vectors (K,) -> (ranks, K).
    """
    h = _hash(fields, numbers)
    greatest, least, failed = maximum(np.array([h, -h, error is not None], dtype=np.int64)).tolist()
    if greatest == -least and not failed:
        return
    if error is None:
        said = _CALL + _fields.pack(numbers) + fields
    else:
        said = _ERROR + f"{type(error).__name__}: {error}".encode()
    everything = gather(_padded(said))
    raise SyncMismatchError(_explanation([row.tobytes().rstrip(b"\0") for row in everything])) from error


def _hash(fields: bytes, numbers: Mapping[str, int]) -> int:
    """63 bits: two different calls meet with a chance of 1e-19."""
    said = struct.pack(f"<{len(numbers)}q", *numbers.values()) + fields
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little") >> 1


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
