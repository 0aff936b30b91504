"""What a rank says of a collective call: named settings, packed to bytes that are equal where the settings are."""

from __future__ import annotations

import struct
from collections.abc import Mapping

Field = str | int | float


def pack(fields: Mapping[str, Field]) -> bytes:
    """Name and value of every field, in order. Not hash(), which differs between processes, nor repr()."""
    return b"".join(_packed(item) for pair in fields.items() for item in pair)


def unpack(packed: bytes) -> dict[str, Field]:
    """The fields that `pack` was given."""
    items: list[Field] = []
    while packed:
        tag, packed = packed[:1], packed[1:]
        if tag == b"s":
            (length,) = struct.unpack_from("<I", packed)
            items.append(packed[4 : 4 + length].decode())
            packed = packed[4 + length :]
        else:
            (number,) = struct.unpack_from("<q" if tag == b"i" else "<d", packed)
            items.append(number)
            packed = packed[8:]
    return {str(name): value for name, value in zip(items[::2], items[1::2], strict=True)}


def _packed(item: Field) -> bytes:
    if isinstance(item, str):
        text = item.encode()
        return b"s" + struct.pack("<I", len(text)) + text
    if isinstance(item, int):
        return b"i" + struct.pack("<q", item)
    return b"d" + struct.pack("<d", item)
