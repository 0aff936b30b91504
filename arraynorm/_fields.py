"""What a rank says of a collective call: named settings, packed to bytes that are equal where the settings are."""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Mapping

Field = str | int | float


def pack(fields: Mapping[str, Field]) -> bytes:
    """Name and value of every field, in order. Not hash(), which differs between processes, nor repr()."""
    return _packed_all(*fields, *fields.values())


def unpack(packed: bytes) -> dict[str, Field]:
    """The fields that `pack` was given, as far as they are all there; of other bytes, none."""
    items: list[Field] = []
    try:
        while packed:
            item, packed = _first(packed)
            items.append(item)
    except (struct.error, UnicodeDecodeError):  # cut off, or never packed here
        pass
    return {str(name): value for name, value in zip(items[::2], items[1::2], strict=False)}


def _first(packed: bytes) -> tuple[Field, bytes]:
    tag, packed = packed[:1], packed[1:]
    if tag == b"s":
        (length,) = struct.unpack_from("<I", packed)
        return packed[4 : 4 + length].decode(), packed[4 + length :]
    (number,) = struct.unpack_from("<q" if tag == b"i" else "<d", packed)
    return number, packed[8:]


@functools.lru_cache(maxsize=1024)  # a layer says the same in every step
def _packed_all(*names_and_values: Field) -> bytes:
    half = len(names_and_values) // 2
    pairs = zip(names_and_values[:half], names_and_values[half:], strict=True)
    return b"".join(map(_packed, itertools.chain.from_iterable(pairs)))


def _packed(item: Field) -> bytes:
    if isinstance(item, str):
        text = item.encode()
        return b"s" + struct.pack("<I", len(text)) + text
    # What is equal is packed alike, as the cache has it too: 1.0 and True as 1, and -0.0 as 0.
    if isinstance(item, int) or (item.is_integer() and abs(item) < 2**63):
        return b"i" + struct.pack("<q", int(item))
    return b"d" + struct.pack("<d", item)
