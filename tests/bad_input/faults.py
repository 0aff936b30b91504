"""Ways to spoil a good argument, and what the contract says must come of each.

Of an argument of the wrong kind the contract makes a TypeError, of one with a wrong shape or value a ValueError; an
array that is only laid out unusually is legal and must give what its plain copy gives.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import array_api_strict
import ml_dtypes
import numpy as np

import arraynorm as an
from arraynorm.distributed import ThreadCommunicator

Spoil = Callable[[Any], Any]


class Fault(NamedTuple):
    """One way to spoil an argument."""

    name: str
    spoil: Spoil
    """The good value -> a spoiled one in memory of its own."""
    refused: tuple[type[Exception], ...] = ()
    """The errors that the contract allows."""
    plain: Spoil | None = None
    """For a legal value: the plain one that must give the same answer."""
    relative: bool = False
    """Wrong beside the other good arguments only: a second fault may make it right."""


def faults(spoils: dict[str, Spoil], *refused: type[Exception], plain: Spoil | None = None) -> list[Fault]:
    return [Fault(name, spoil, refused, plain) for name, spoil in spoils.items()]


def values(values: dict[str, Any], *refused: type[Exception], plain: Spoil | None = None) -> list[Fault]:
    """Faults that put a value in the place of any good one."""
    return faults({name: lambda good, value=value: value for name, value in values.items()}, *refused, plain=plain)


# -- arrays that are none, or that mean more than their elements -----------------------------------------------


class Tagged(np.ndarray):
    """A subclass, which may mean anything."""


def matrix(good: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.matrix(good.reshape(-1, 1))


def record(good: Any) -> Any:
    return np.rec.fromarrays([good], names="value")


NOT_ARRAYS = [
    *faults({"a list": lambda a: a.tolist(), "a tuple": lambda a: tuple(a.reshape(-1).tolist())}, TypeError),
    *values({"a number": 1.5, "a NumPy scalar": np.float64(1.5), "a string": "x", "bytes": b"x"}, TypeError),
    *values(
        {"an object": object(), "a class": np.ndarray, "a dict": {}, "the masked constant": np.ma.masked}, TypeError
    ),
    *faults(
        {
            "a memoryview": lambda a: memoryview(a.copy()),
            "a masked array": lambda a: np.ma.masked_array(a.copy(), mask=np.zeros(a.shape, bool)),
            "a matrix": matrix,
            "a subclass": lambda a: a.copy().view(Tagged),
            "a record array": record,
        },
        TypeError,
    ),
    Fault("of another library", lambda a: array_api_strict.asarray(a.copy()), (TypeError,), relative=True),
]
REQUIRED = values({"None": None}, TypeError)
OPTIONAL = values({"None": None}, plain=lambda value: value)

# -- dtypes ----------------------------------------------------------------------------------------------------


def cast(dtype: Any) -> Spoil:
    return lambda a: np.ones(a.shape).astype(dtype)


NO_NUMBERS = {
    "bool": cast(bool),
    "complex64": cast(np.complex64),
    "complex128": cast(np.complex128),
    "object": cast(object),
    "longdouble": cast(np.longdouble),
    "bytes strings": cast("S3"),
    "strings": cast("U3"),
    "a structured dtype": lambda a: np.zeros(a.shape, dtype=[("re", "f4"), ("im", "f4")]),
    "times": lambda a: np.zeros(a.shape, dtype="datetime64[s]"),
    "time spans": lambda a: np.zeros(a.shape, dtype="timedelta64[s]"),
    "float8": cast(ml_dtypes.float8_e4m3fn),
    "int4": cast(ml_dtypes.int4),
}
INTEGERS = {name: cast(name) for name in ("int16", "uint16", "int32", "int64", "uint64")}
BYTES = {"int8": cast("i1"), "uint8": cast("u1")}
NOT_FLOATING = faults(NO_NUMBERS | INTEGERS | BYTES, TypeError)
NOT_QUANTIZED = faults(NO_NUMBERS | INTEGERS | {name: cast(name) for name in ("f2", "f4", "f8")}, TypeError)
# "converted or refused, never misread"
SWAPPED = [Fault("byte-swapped", lambda a: a.astype(a.dtype.newbyteorder()), (TypeError,), lambda a: a.astype("f8"))]
NARROWER = faults(
    {name: lambda a, d=d: a.astype(d) for name, d in (("f2", "f2"), ("f4", "f4"), ("bfloat16", ml_dtypes.bfloat16))},
    plain=lambda a: a.astype(np.float64),
)

# -- shapes ----------------------------------------------------------------------------------------------------

SHAPES = [
    fault._replace(relative=True)
    for fault in faults(
        {
            "one more": lambda a: np.concatenate([a, a[:1]]),
            "one fewer": lambda a: a[1:].copy(),
            "one alone, which would broadcast": lambda a: a[:1].copy(),
            "none at all": lambda a: a[:0].copy(),
            "an axis more": lambda a: a[None].copy(),
            "an axis more at the end": lambda a: a[..., None].copy(),
            "no dimensions": lambda a: a.reshape(-1)[:1].reshape(()).copy(),
            "one dimension of all": lambda a: a.reshape(-1).copy() if a.ndim > 1 else a[:, None].copy(),
        },
        ValueError,
    )
]

# -- layouts, all of them legal --------------------------------------------------------------------------------


def strided(a: Any) -> Any:
    buffer = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.array(99, a.dtype))
    buffer[..., ::2] = a
    return buffer[..., ::2]


def padded(a: Any) -> Any:
    buffer = np.full([n + 2 for n in a.shape], np.array(99, a.dtype))
    inner = buffer[tuple(slice(1, -1) for _ in a.shape)]
    inner[...] = a
    return inner


def reversed_in_memory(a: Any) -> Any:
    return np.flip(np.flip(a).copy())


def fortran(a: Any) -> Any:
    return np.array(a, order="F")


def axes_swapped(a: Any) -> Any:
    return np.swapaxes(np.swapaxes(a, 0, -1).copy(), 0, -1)


def unaligned(a: Any) -> Any:
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    shifted = buffer[1:].view(a.dtype).reshape(a.shape)
    shifted[...] = a
    return shifted


def memory_mapped(a: Any) -> Any:
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, a.dtype, "w+", shape=a.shape)
    mapped[...] = a
    return mapped


def read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def constant_along_first(a: Any) -> Any:
    return np.broadcast_to(a[:1].copy(), a.shape)


def constant_everywhere(a: Any) -> Any:
    return np.broadcast_to(a.reshape(-1)[:1].copy(), a.shape)


def one_element_for_all(a: Any) -> Any:
    return np.lib.stride_tricks.as_strided(a.reshape(-1)[:1].copy(), a.shape, (0,) * a.ndim)


WRITEABLE = {
    "every second element": strided,
    "inside a bigger array": padded,
    "negative strides": reversed_in_memory,
    "column-major": fortran,
    "axes in another order": axes_swapped,
    "unaligned": unaligned,
    "memory-mapped": memory_mapped,
}
READ_ONLY = {
    "read-only": read_only,
    "zero strides along the first axis": constant_along_first,
    "zero strides": constant_everywhere,
}
LAYOUTS = faults(WRITEABLE | READ_ONLY, plain=np.array)


def overlapping_rows(a: Any) -> Any:
    """Writeable; the second row begins within the first, though there are gaps between elements."""
    buffer = np.zeros(4 * a.size, a.dtype)
    inner = buffer[: 2 * a[:1].size : 2].reshape(a[:1].shape)
    return np.lib.stride_tricks.as_strided(buffer, a.shape, (2 * a.itemsize, *inner.strides[1:]))


# -- settings --------------------------------------------------------------------------------------------------


class Index:
    """An integer by Python's protocol."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


NOT_SCALARS = {
    "a string": "1",
    "bytes": b"1",
    "True": True,
    "NumPy's True": np.True_,
    "complex": 1j,
    "NumPy's complex": np.complex128(1),
    "a list": [1],
    "an array of one element": np.array([1]),
    "an object": object(),
    "a 0-d array of a string": np.array("1"),
    "a 0-d array of a bool": np.array(True),
    "a 0-d array of a complex": np.array(1 + 0j),
    "a time span": np.timedelta64(1, "s"),
    "the masked constant": np.ma.masked,
}
NOT_REAL = values(NOT_SCALARS, TypeError)
REALS = values(
    {
        "an int": 1,
        "NumPy's float32": np.float32(0.5),
        "NumPy's int": np.int64(1),
        "a 0-d array": np.array(0.5),
        "a fraction": Fraction(1, 2),
        "a decimal": Decimal("0.5"),
    },
    plain=float,
)
NOT_FINITE = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "an int beyond any float": 10**400}
NOT_INTEGER = values(NOT_SCALARS | {"a float": 1.0, "NumPy's float": np.float64(1), "None": None}, TypeError)
INDEXES = faults(
    {"NumPy's int": np.int32, "a 0-d array": np.array, "an __index__": lambda i: Index(int(i))},
    plain=lambda i: i.__index__(),
)
NO_AXIS = values({"too large": 4, "too small": -5, "huge": 10**30}, ValueError)
SCALE = [*NOT_REAL, *REALS, *REQUIRED, *values(NOT_FINITE | {"zero": 0.0, "negative": -0.5}, ValueError)]
ZERO_POINT = [*NOT_INTEGER, *INDEXES, *values({"too large": 256, "too small": -129, "huge": 10**30}, ValueError)]
EPS = [*NOT_REAL, *REALS, *values(NOT_FINITE | {"negative": -1e-5}, ValueError)]
MOMENTUM = [*NOT_REAL, *REALS, *values(NOT_FINITE | {"negative": -0.1, "above 1": 1.1}, ValueError)]
# A size of the wrong kind is a ValueError by behaviour 6, a TypeError by the common rule.
NOT_SIZES = values(NOT_SCALARS | {"a float": 2.0, "None": None}, ValueError, TypeError)


class Intracomm:
    """mpi4py's, as far as one can tell without it."""


Intracomm.__module__ = "mpi4py.MPI"
NOT_COMMUNICATORS = {"a string": "world", "a number": 2, "an object": object(), "a class": ThreadCommunicator}
COMM = values(NOT_COMMUNICATORS | {"a raw mpi4py communicator": Intracomm()}, TypeError)

CACHES = [an.layer_norm_forward(np.ones((2, 3)), 3)[1], an.rms_norm_forward(np.ones((2, 3)), 3)[1]]
CACHE = [
    *values({"None": None, "a string": "cache", "an array": np.ones(3)}, TypeError),
    *faults(
        {
            "another op's": lambda cache: next(other for other in CACHES if type(other) is not type(cache)),
            "a plain tuple": tuple,
            "a dict": lambda cache: cache._asdict(),
            "its class": type,
        },
        TypeError,
    ),
    Fault("of another library", lambda cache: cache.to(array_api_strict), (TypeError,), relative=True),
]

# -- which faults an argument may have -------------------------------------------------------------------------

COMPANION = [*NOT_ARRAYS, *NOT_FLOATING, *SWAPPED, *SHAPES, *LAYOUTS]
RUNNING = [*COMPANION, *REQUIRED]
STATISTIC = [*RUNNING, *NARROWER]
PARAMETER = [*COMPANION, *OPTIONAL, *NARROWER]
SWAPPED_OUT = [fault._replace(plain=None) for fault in SWAPPED]
OUT = [
    *NOT_ARRAYS,
    *faults(NO_NUMBERS | INTEGERS | {"f2": cast("f2"), "f4": cast("f4")}, TypeError),
    *SWAPPED_OUT,
    *SHAPES,
    *faults(READ_ONLY | {"one element for all": one_element_for_all, "overlapping rows": overlapping_rows}, ValueError),
    *faults(WRITEABLE, plain=np.array),
    *OPTIONAL,
]
BY_ARGUMENT: dict[str, list[Fault]] = {
    "x": RUNNING,
    "xq": [*NOT_ARRAYS, *NOT_QUANTIZED, *SHAPES, *LAYOUTS, *REQUIRED],
    "dy": STATISTIC,
    "addend": PARAMETER,
    "weight": PARAMETER,
    "bias": PARAMETER,
    "mean": STATISTIC,
    "var": STATISTIC,
    "running_mean": RUNNING,
    "running_var": RUNNING,
    "out": OUT,
    # A tuple is right there, but not one of 120 numbers: its length, a value, is as wrong as its kind.
    "out or pair": [f._replace(refused=(TypeError, ValueError)) if f.name == "a tuple" else f for f in OUT],
    "8-bit out": [f for f in OUT if f not in SWAPPED_OUT],  # one byte has no order
    "cache": CACHE,
    "axis": [*NOT_INTEGER, *INDEXES, *NO_AXIS],
    "later axis": [*NOT_INTEGER, *INDEXES, *NO_AXIS, *values({"the samples'": 0, "the samples', -4": -4}, ValueError)],
    "eps": [*EPS, *REQUIRED],
    "eps or None": [*EPS, *OPTIONAL],
    "momentum": [*MOMENTUM, *REQUIRED],
    "momentum or None": MOMENTUM,
    "comm": COMM,
    "num_groups": [
        *NOT_SIZES,
        *INDEXES,
        *values({"0": 0, "negative": -1, "no divisor": 4, "huge": 10**30}, ValueError),
    ],
    "normalized_shape": [
        *NOT_SIZES,
        *values({"()": (), "[]": [], "one size alone": 2, "turned": (5, 2), "too many": (4, 3, 2, 2, 5)}, ValueError),
        *values({"negative": (-2, 5), "floats": (2.0, 5.0), "strings": ("2", "5"), "bools": (True, 5)}, ValueError),
        *values(
            {"a set": {2, 5}, "bytes that are sizes": b"\x02\x05", "an array": np.array([2, 5])}, ValueError, TypeError
        ),
        *values({"a list": [2, 5], "NumPy's ints": (np.int64(2), np.int64(5))}, plain=tuple),
    ],
    "x_scale": SCALE,
    "y_scale": SCALE,
    "x_zero_point": ZERO_POINT,
    "y_zero_point": ZERO_POINT,
}
