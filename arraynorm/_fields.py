"""What a rank says of a collective call: named settings, packed to bytes that are equal where the settings are."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping

Field = str | int | float

_INTEGER, _REAL = struct.Struct("<cq"), struct.Struct("<cd")


def pack(fields: Mapping[str, Field]) -> bytes:
    """Name and value of every field, in order. Not hash(), which differs between processes, nor repr()."""
    return b"".join([_packed_text(name) + _packed(value) for name, value in fields.items()])


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


def _packed(item: Field) -> bytes:
    if isinstance(item, str):
        return _packed_text(item)
    return _INTEGER.pack(b"i", item) if isinstance(item, int) else _REAL.pack(b"d", item)


@functools.lru_cache(maxsize=512)  # names, and most texts, are the same in every call
def _packed_text(text: str) -> bytes:
    encoded = text.encode()
    return b"s" + struct.pack("<I", len(encoded)) + encoded
