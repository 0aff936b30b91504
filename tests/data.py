"""The numbers that normalization gets wrong, and the ones that any norm gets right.

A table (sets, n) holds one set of values in each row; `spread` lays it out as the x of a norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from namespaces import numpy_dtype

Host = np.ndarray[Any, Any]
Draw = Callable[[np.random.Generator, int, Any], Host]

SIZES = (1, 31, 33, 1023)
"""Next to the widths of vector registers and blocks, and not multiples of them."""


def _shifted(mean: float) -> Draw:
    return lambda rng, n, limits: mean + rng.standard_normal(n)


def _constant(value: float) -> Draw:
    return lambda rng, n, limits: np.full(n, value)


def _near_65504(rng: np.random.Generator, n: int, limits: Any) -> Host:
    return 65504.0 - 32 * rng.integers(0, 20, n)  # 32 is float16's spacing there: x * x, and any sum, overflow it


def _subnormal(rng: np.random.Generator, n: int, limits: Any) -> Host:
    return rng.integers(-100, 101, n) * float(limits.smallest_subnormal)


def _outlier(place: Callable[[int], int]) -> Draw:
    def draw(rng: np.random.Generator, n: int, limits: Any) -> Host:
        values = rng.standard_normal(n)
        values[place(n)] = min(1e30, float(limits.max))
        return values

    return draw


CONSTANTS = {
    "constant 1e4+0.3": 1e4 + 0.3,
    "constant 1e7": 1e7,
    "constant 1e10": 1e10,
    "constant -0.1": -0.1,
    "constant 0.01": 0.01,
}

_DRAWS: dict[str, Draw] = {
    "mean/std 1e2": _shifted(1e2),
    "mean/std 1e3": _shifted(1e3),
    "mean/std 1e4": _shifted(1e4),
    "mean/std 1e5": _shifted(1e5),
    "mean/std 1e6": _shifted(-1e6),
    "40000..40003": lambda rng, n, limits: 40000.0 + np.arange(n) % 4,
    "near 65504": _near_65504,
    "subnormal": _subnormal,
    "an outlier of 1e30": _outlier(lambda n: n // 2),
    "an outlier of 1e30 first": _outlier(lambda n: 0),  # where a pivot is taken
    **{name: _constant(value) for name, value in CONSTANTS.items()},
}


def limits(dtype: str) -> Any:
    """finfo of any of the four dtypes."""
    return ml_dtypes.finfo(dtype) if dtype == "bfloat16" else np.finfo(dtype)


def hard_names(dtype: str) -> list[str]:
    """The hard data that the dtype can hold."""
    return [name for name in _DRAWS if np.isfinite(hard(name, dtype, 2, 4)).all()]


def hard(name: str, dtype: str, sets: int, n: int) -> Host:
    """(sets, n) float64: hard in every odd row, easy in the others, which must not notice; representable in dtype."""
    rng = np.random.default_rng(sum(name.encode()))
    table = rng.standard_normal((sets, n))
    for row in table[1::2]:
        row[:] = _DRAWS[name](rng, n, limits(dtype))
    with np.errstate(over="ignore"):
        return table.astype(numpy_dtype(dtype)).astype(np.float64)


def spread(table: Host, sets: Host, shape: tuple[int, ...]) -> Host:
    """The array of `shape` whose r-th set (a row of flat indices) has the values of the table's r-th row."""
    x = np.empty(table.size)
    x[sets] = table
    return x.reshape(shape)
