"""The record of torch's results: `recorded.npz`, which `record` writes and `test_recorded` replays without torch.

All numbers of one dtype stand end to end in one array (thousands of small ones would be mostly headers), and "index"
says in JSON what they are. Written anew from equal results the file is equal, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from parity import cases
from parity.cases import Array, Results

PATH = Path(__file__).with_name("recorded.npz")


def write(torch: str, named_results: Iterable[tuple[str, Results]]) -> None:
    """`torch` says which one it was."""
    index: dict[str, Any] = {"torch": torch, "cases": {}}
    numbers: dict[str, list[Array]] = {}
    for name, results in named_results:
        index["cases"][name] = [[key, str(array.dtype), array.shape] for key, array in results.items()]
        for array in results.values():
            numbers.setdefault(str(array.dtype), []).append(array.reshape(-1))
    arrays = {dtype: np.concatenate(parts) for dtype, parts in numbers.items()}
    # no npz holds a bfloat16
    bits = {dtype: array.view(np.uint16) if dtype == "bfloat16" else array for dtype, array in arrays.items()}
    np.savez_compressed(PATH, index=np.frombuffer(json.dumps(index).encode(), dtype=np.uint8), **bits)


def read() -> tuple[str, dict[str, Results]]:
    """Which torch it was, and its results by the case's name."""
    with np.load(PATH) as file:
        arrays = dict(file)
    index = json.loads(arrays.pop("index").tobytes())
    arrays = {dtype: array.view(cases.dtype(dtype)) for dtype, array in arrays.items()}
    used = dict.fromkeys(arrays, 0)
    found: dict[str, Results] = {}
    for name, entries in index["cases"].items():
        found[name] = {}
        for key, dtype, shape in entries:
            size = int(np.prod(shape))
            found[name][key] = arrays[dtype][used[dtype] : used[dtype] + size].reshape(shape)
            used[dtype] += size
    return index["torch"], found
