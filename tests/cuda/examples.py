"""What the emulated kernels run on: for each op the layouts, and sizes that take every kernel and break its tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from arraynorm.kernels.cuda._instances import widths
from cuda.emulated import LARGE, SMALL
from namespaces import NUMPY
from norms import GIVEN, Example, draw, draw_dy, to_library

DEVICES = {"small": SMALL, "large": LARGE}


class Run(NamedTuple):
    """An op on arrays of some layout, planned for a device."""

    example: Example
    layout: str
    device: str
    width: int = 0
    """If not 0, arrays begin where packs may have so many elements and no more."""

    def __str__(self) -> str:
        width = f", packs of {self.width}" if self.width else ""
        return f"{self.example}, {self.layout}, {self.device}{width}"

    def arrays(self, dtype: str) -> tuple[dict[str, Any], Any]:
        """x and what goes with it, and dy."""
        arrays = to_library(NUMPY, draw(self.example), dtype)
        arrays |= {name: self._place(arrays[name]) for name in ("x", "addend") if name in arrays}
        return arrays, self._place(NUMPY.asarray(draw_dy(self.example), dtype))

    def _place(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self.layout == "contiguous" and self.width:
            return aligned(a, self.width * a.itemsize)
        return LAYOUTS[self.layout](a)


def aligned(a: np.ndarray[Any, Any], to: int) -> np.ndarray[Any, Any]:
    """A copy at an address that `to`, a power of two of bytes below 32, divides and twice that does not."""
    memory = np.empty(a.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 32 + to % 32
    view = memory[first : first + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def _sliced(a: np.ndarray[Any, Any], first: int = 16) -> np.ndarray[Any, Any]:
    """Channels of an array that has more, from the 16th on: runs as long, further apart, still at whole packs."""
    wide = np.zeros((a.shape[0], a.shape[1] + 32, *a.shape[2:]), a.dtype)
    view = wide[:, first : first + a.shape[1]]
    view[...] = a
    return view


LAYOUTS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "contiguous": lambda a: a,
    "channels last in memory": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "sliced": _sliced,
    "sliced between packs": lambda a: _sliced(a, 1),
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
}

_BATCH = [op for op in GIVEN if op.startswith("batch_norm")]
_ROWS = ("layer_norm", "rms_norm")


def packed(dtype: str) -> Iterator[Run]:
    """Sizes that are multiples of the widest pack; between them they launch every template."""
    w = widths(dtype)[0]
    for device in DEVICES:
        for op in _BATCH:
            yield Run(Example(op, (3, 4, 2 * w, 8)), "contiguous", device)
            yield Run(Example(op, (19, 16)), "contiguous", device)
        yield Run(Example("batch_norm", (3, 4, 2 * w, 4)), "sliced", device)
        yield Run(Example("batch_norm_add_relu", (3, 8 * w, 5)), "channels last in memory", device)
        for op, options in (("instance_norm", {}), ("group_norm", {"num_groups": 2})):
            yield Run(Example(op, (3, 4, 2 * w), options), "contiguous", device)
            yield Run(Example(op, (3, 5, 4 * w), options | {"axis": -1}), "contiguous", device)
        yield Run(Example("group_norm", (2, 6, w), {"num_groups": 1}), "sliced", device)
        for op in _ROWS:
            yield Run(Example(op, (17, 8 * w), {"normalized_shape": (8 * w,)}), "contiguous", device)
    for op in _ROWS:  # too long for the sums of small's row_backward
        yield Run(Example(op, (3, 4096), {"normalized_shape": (4096,)}), "contiguous", "small")
    for op in ("batch_norm", "instance_norm", "batch_norm_add_relu"):  # cut into parts
        yield Run(Example(op, (1 if op == "instance_norm" else 2, 1, 2048 * w)), "contiguous", "small")
    yield Run(Example("group_norm", (1, 2, 2048 * w), {"num_groups": 1}), "contiguous", "small")


def single(dtype: str) -> Iterator[Run]:
    """Odd sizes, and strides that only single elements fit."""
    for device in DEVICES:
        for op in _BATCH:
            yield Run(Example(op, (3, 5, 31)), "contiguous", device)
            yield Run(Example(op, (37, 7)), "contiguous", device)
        yield Run(Example("batch_norm_add_relu", (3, 5, 16)), "every second", device)
        yield Run(Example("batch_norm_add_relu", (37, 16)), "sliced between packs", device)
        yield Run(Example("batch_norm", (3, 5, 7, 3)), "channels last in memory", device)
        for op, options in (("instance_norm", {}), ("group_norm", {"num_groups": 3})):
            yield Run(Example(op, (3, 9, 11), options), "contiguous", device)
            yield Run(Example(op, (3, 11, 9), options | {"axis": -1}), "contiguous", device)
            yield Run(Example(op, (3, 9, 2, 3), options), "every second", device)
        yield Run(Example("group_norm", (2, 6, 7), {"num_groups": 1}), "sliced", device)
        for op in _ROWS:
            yield Run(Example(op, (17, 33), {"normalized_shape": (33,)}), "contiguous", device)
            yield Run(Example(op, (5, 7), {"normalized_shape": (7,)}), "every second", device)
    for op in _ROWS:
        yield Run(Example(op, (3, 2047), {"normalized_shape": (2047,)}), "contiguous", "small")
    for op in ("batch_norm", "instance_norm", "batch_norm_add_relu"):
        yield Run(Example(op, (1 if op == "instance_norm" else 3, 1, 4097)), "contiguous", "small")
    yield Run(Example("group_norm", (1, 3, 1367), {"num_groups": 1}), "contiguous", "small")


RUNS = {"float16": packed, "bfloat16": single, "float32": packed, "float64": single}
"""One width to a dtype, for `make test`; `make cuda-check` takes `every_width`."""


def every_width(dtype: str) -> Iterator[Run]:
    """All runs that take every instance of a dtype."""
    yield from single(dtype)
    for width in widths(dtype):
        if width > 1:
            yield from (run._replace(width=width) for run in packed(dtype) if run.layout == "contiguous")
    yield from (run for run in packed(dtype) if run.layout != "contiguous")
