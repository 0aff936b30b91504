"""What is measured: a case is one operation on one shape, dtype and layout, with the data it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

DTYPES = ("float32", "float16", "bfloat16")
EPS = 1e-5

# Loose: a wrong formula is off by much more. Relative to the largest element of the result.
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}  # the last two: 8 units in the last place


@dataclass(frozen=True)
class Case:
    norm: str
    op: str
    shape: tuple[int, ...]
    """(N, C, ...), or (rows, K) of a layer or RMS norm."""
    dtype: str = "float32"
    layout: str = "contiguous"
    """Or "channels last": the same elements in memory as (N, ..., C)."""
    read: int = 1
    """How often the model of bytes counts reading x's size: of everything needed once, for what is looked at twice may
    sit in a cache. Parameters, statistics and the bits of a ReLU mask are not counted."""
    written: int = 1
    groups: int | None = None
    tags: frozenset[str] = frozenset({"table"})
    """"table": a row of the bars; "small": one small call; "large": 100 MB and more."""

    @property
    def name(self) -> str:
        parts = [self.norm, self.op, "x".join(map(str, self.shape)), self.dtype]
        return " ".join(parts if self.layout == "contiguous" else [*parts, self.layout])

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        itemsize = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}[self.dtype]
        return int(np.prod(self.shape)) * itemsize

    @property
    def moved(self) -> int:
        return (self.read + self.written) * self.nbytes

    def shrunk(self) -> Case:
        """The same on a shape that takes no time."""
        limits = (4, 64) + (6,) * (len(self.shape) - 2)
        return replace(self, shape=tuple(map(min, self.shape, limits)))


class Competitor(NamedTuple):
    run: Callable[[], Any]
    results: Callable[[Any], Iterable[Any]]
    """What `run` returned -> the arrays to compare, as NumPy arrays in x's layout."""
    tolerance: float | None = None
    """Of a peer known to be inaccurate that is timed all the same; else that of the dtype."""


class Data:
    """The arrays of a case. x, dy and addend stand in memory as the layout says; parameters are float32.

    (Parameters in float16 make torch neither faster nor slower, only less accurate. RMS norm takes them in x's dtype:
    torch has no fast path otherwise.)
    """

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case = case
        shape = case.shape
        self.axis = 1
        if case.layout == "channels last":
            shape, self.axis = (shape[0], *shape[2:], shape[1]), -1
        self._shape, self._rng = shape, rng
        channels = (case.shape[1],)
        self.weight = rng.uniform(0.5, 1.5, channels).astype(np.float32)
        self.bias = rng.standard_normal(channels, np.float32)
        self.mean = rng.standard_normal(channels, np.float32)
        self.var = rng.uniform(0.5, 1.5, channels).astype(np.float32)

    @cached_property
    def x(self) -> Any:
        return self._drawn()

    @cached_property
    def dy(self) -> Any:
        return self._drawn()

    @cached_property
    def addend(self) -> Any:
        """Far from 0 on either side: next to it, rounding would decide whether a ReLU passes a gradient."""
        addend = self._drawn()
        addend += np.copysign(24, addend.astype(np.float32)).astype(addend.dtype)
        return addend

    @cached_property
    def out(self) -> Any:
        return np.zeros_like(self.x)

    @cached_property
    def out2(self) -> Any:
        return np.zeros_like(self.x)

    def wide(self) -> Data:
        """The same values in float64."""
        other = object.__new__(Data)
        other.case, other.axis = self.case, self.axis
        for name in ("x", "dy", "addend", "weight", "bias", "mean", "var"):
            setattr(other, name, getattr(self, name).astype(np.float64))
        return other

    def _drawn(self) -> Any:
        if self.case.dtype == "uint8":
            return self._rng.integers(0, 256, self._shape, np.uint8)
        return self._rng.standard_normal(self._shape, np.float32).astype(np.dtype(dtype_of(self.case.dtype)))


def dtype_of(name: str) -> Any:
    """NumPy's dtype, ml_dtypes' for bfloat16."""
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16


def first(raw: Any) -> tuple[Any]:
    """y of (y, cache) or of torch's (y, mean, rstd)."""
    return (raw[0],)


def alone(raw: Any) -> tuple[Any]:
    return (raw,)


def every(raw: Any) -> Any:
    return raw


def disagreement(
    case: Case, results: Iterable[Any], expected: Iterable[Any], tolerance: float | None = None
) -> tuple[float, str]:
    """The largest error, relative to the largest element; and, if that is too much, a sentence that says so.

    Of quantized results it is in levels: one is allowed, in the rare ties.
    """
    worst, complaint = 0.0, ""
    allowed = TOLERANCE.get(case.dtype) if tolerance is None else tolerance
    results, expected = list(results), list(expected)
    if len(results) != len(expected):
        return np.inf, f"{len(results)} results instead of {len(expected)}"
    for position, (result, reference) in enumerate(zip(results, expected, strict=True)):
        if result.shape != reference.shape:
            return np.inf, f"result {position} has shape {result.shape} instead of {reference.shape}"
        if case.dtype == "uint8":
            error = np.abs(result.astype(np.int16) - reference)
            largest = float(error.max())
            wrong = largest > 1 or np.count_nonzero(error) > 1e-3 * error.size
        else:
            largest = float(np.abs(result.astype(np.float64) - reference).max() / np.abs(reference).max())
            wrong = not largest <= allowed  # which a NaN is not either
        if wrong:
            complaint = f"result {position} is off by {largest:.1e} of its largest element"
        worst = max(worst, largest)
    return worst, complaint


def with_dtypes(cases: Iterable[Case]) -> list[Case]:
    """The cases in every floating dtype."""
    return [replace(case, dtype=dtype) for case in cases for dtype in DTYPES]
