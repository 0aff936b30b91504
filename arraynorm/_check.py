"""The checks of arrays and settings, and the wording of their errors.

A message says function, argument, rule and value: `batch_norm: weight must have shape (64,), got (32,)`.
Where torch has an established text (`expected 4D input (got 3D input)`), users search for that one, so it is kept.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from arraynorm import _array
from arraynorm.typing import Array, Communicator

# -- arrays ----------------------------------------------------------------------------------------------------


def array(function: str, name: str, value: object) -> None:
    """`value` is an array that means nothing but its elements."""
    if isinstance(value, np.ndarray):
        if type(value) is not np.ndarray and type(value) is not np.memmap:
            # a mask, a unit or a matrix product would be silently ignored
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"{function}: {name} must be a plain array, got {kind}; pass np.asarray({name})")
        if not value.dtype.isnative:
            raise TypeError(f"{function}: {name} must have the machine's byte order, got dtype {value.dtype.str}")
    elif not _array.is_array(value):
        raise TypeError(f"{function}: {name} must be an array, got {type(value).__qualname__}")


def floating(function: str, name: str, value: Array) -> None:
    """`value` is an array of float16, bfloat16, float32 or float64."""
    array(function, name, value)
    if not _array.is_floating(value):
        raise TypeError(f"{function}: {name} must have dtype float16, bfloat16, float32 or float64, got {value.dtype}")


def same_library(function: str, x: Array, name: str, value: Array) -> None:
    """`value` comes from x's library: nothing is copied between libraries or devices silently."""
    if _array.library(value) != _array.library(x):
        raise TypeError(
            f"{function}: {name} must come from the library of x, {_array.library(x)}, got {_array.library(value)}"
        )


def input_array(function: str, name: str, x: Array) -> None:
    """The array that decides library and dtype: floating, and its library computes in float64."""
    floating(function, name, x)
    if not _array.has_float64(_array.array_namespace(x)):
        raise TypeError(
            f"{function}: {name} must come from a library that computes in float64, got {_array.library(x)} without "
            "it (for JAX, set jax_enable_x64)"
        )


def companion(function: str, x: Array, name: str, value: Array, shape: tuple[int, ...]) -> None:
    """A floating array of x's library with the given shape: dy, a statistic, a buffer."""
    floating(function, name, value)
    same_library(function, x, name, value)
    has_shape(function, name, value, shape)


def optional_companion(function: str, x: Array, name: str, value: Array | None, shape: tuple[int, ...]) -> None:
    """A companion that may be None: a parameter, an addend."""
    if value is not None:
        companion(function, x, name, value, shape)


def has_shape(function: str, name: str, value: Array, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{function}: {name} must have shape {shape}, got {tuple(value.shape)}")


def output(
    function: str,
    name: str,
    out: Array | None,
    like: Array,
    *,
    apart_from: Sequence[Array | None],
    may_be: Sequence[Array | None] = (),
) -> None:
    """`out` can take a result with the shape and dtype of `like`.

    It must not touch the memory of `apart_from`; arrays of `may_be` it may either equal element by element, or not
    touch. Overlap is judged by memory bounds.
    """
    if out is None:
        return
    array(function, name, out)
    same_library(function, like, name, out)
    if not _array.takes_out(out):
        raise TypeError(f"{function}: {name} is supported for NumPy and CuPy arrays, got {_array.library(out)}")
    if out.dtype != like.dtype:
        raise TypeError(f"{function}: {name} must have dtype {like.dtype}, got {out.dtype}")
    has_shape(function, name, out, tuple(like.shape))
    if _array.is_read_only(out):
        raise ValueError(f"{function}: {name} must be writeable, got a read-only array")
    if _array.overlaps_itself(out):
        raise ValueError(f"{function}: {name} must have elements of its own, got strides {out.strides}")
    for other in apart_from:
        if other is not None and _array.may_overlap(out, other):
            raise ValueError(f"{function}: {name} must not overlap the memory of an input that is still needed")
    for other in may_be:
        if other is not None and _array.may_overlap(out, other) and not _array.is_same_memory(out, other):
            raise ValueError(f"{function}: {name} must be the input itself or not overlap it, got a partial overlap")


# -- settings --------------------------------------------------------------------------------------------------


def real(function: str, name: str, value: object) -> float:
    """A real number as a float: Python's, NumPy's, or a 0-d array; bool, text and complex numbers are none."""
    if not _array.is_real_scalar(value):
        raise TypeError(f"{function}: {name} must be a real number, got {value!r}")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:  # an int beyond any float
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def integer(function: str, name: str, value: object) -> int:
    """An integer (bool is none) as an int."""
    if isinstance(value, bool | np.bool):
        raise TypeError(f"{function}: {name} must be an integer, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{function}: {name} must be an integer, got {value!r}") from None


def epsilon(function: str, eps: object) -> float:
    eps = real(function, "eps", eps)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{function}: eps must be finite and >= 0, got {eps}")
    return eps


def tolerance(function: str, name: str, value: object) -> float:
    number = real(function, name, value)
    if not number >= 0:
        raise ValueError(f"{function}: {name} must be >= 0, got {number}")
    return number


def momentum(function: str, value: object) -> float:
    value = real(function, "momentum", value)
    if not 0 <= value <= 1:
        raise ValueError(f"{function}: momentum must be between 0 and 1, got {value}")
    return value


def channel_axis(function: str, x: Array, axis: object, *, first: int = 0) -> int:
    """`axis` as a number from `first` to x.ndim - 1 (group and instance norm keep axis 0 for the samples)."""
    axis, ndim = integer(function, "axis", axis), len(x.shape)
    if not -ndim <= axis < ndim:
        raise ValueError(f"{function}: axis must be in range for x of {ndim} dimensions, got {axis}")
    if axis % ndim < first:
        raise ValueError(f"{function}: axis must not be the sample axis 0, got {axis} for {ndim} dimensions")
    return axis % ndim


def axis_of_inputs(function: str, axis: object, ndims: tuple[int, ...], *, first: int) -> int:
    """`axis` as a layer keeps it: one that inputs of the most dimensions have (() is any number of them)."""
    axis = integer(function, "axis", axis)
    if ndims and not -max(ndims) <= axis < max(ndims):
        raise ValueError(f"{function}: axis must be in range for inputs of {max(ndims)} dimensions, got {axis}")
    if 0 <= axis < first or (ndims and axis + max(ndims) < first and axis < 0):
        raise ValueError(f"{function}: axis must not be the sample axis 0, got {axis}")
    return axis


def min_ndim(x: Array, ndim: int) -> None:
    if x.ndim < ndim:
        raise ValueError(f"expected at least {ndim}D input (got {x.ndim}D input)")


def channels(function: str, argument: str, x: Array, axis: int, name: str, number: int) -> None:
    """x has a layer's number of channels; the message names both."""
    if x.shape[axis] != number:
        raise ValueError(
            f"{function}: {argument} must have {name} = {number!r} channels on axis {axis}, "
            f"got {x.shape[axis]} in shape {tuple(x.shape)}"
        )


def ndim_in(x: Array, ndims: tuple[int, ...]) -> None:
    """x has one of these numbers of dimensions; () is any from 2. Torch's text."""
    if not ndims:
        min_ndim(x, 2)
    elif x.ndim not in ndims:
        raise ValueError(f"expected {' or '.join(f'{n}D' for n in ndims)} input (got {x.ndim}D input)")


def count(function: str, name: str, value: object, *, minimum: int) -> int:
    """A size of a layer: bool, float and what is below `minimum` are ValueErrors."""
    try:
        number = integer(function, name, value)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if number < minimum:
        raise ValueError(f"{function}: {name} must be >= {minimum}, got {number}")
    return number


def normalized_shape(function: str, shape: object) -> tuple[int, ...]:
    """An int becomes a 1-tuple; () is refused."""
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str | bytes) else (shape,)
    if not sizes:
        raise ValueError(f"{function}: normalized_shape must name at least one dimension, got ()")
    return tuple(count(function, "normalized_shape", size, minimum=0) for size in sizes)


def ends_with(x: Array, shape: tuple[int, ...]) -> None:
    """x's last dimensions are `shape`; torch's text."""
    if tuple(x.shape[x.ndim - len(shape) :]) != shape or x.ndim < len(shape):
        expected = ", ".join(("*", *map(str, shape)))
        raise ValueError(
            f"Given normalized_shape={list(shape)}, expected input with shape [{expected}], "
            f"but got input of size {tuple(x.shape)}"
        )


def groups(function: str, num_groups: object, num_channels: int) -> int:
    number = count(function, "num_groups", num_groups, minimum=1)
    if num_channels % number:
        raise ValueError(
            f"num_channels must be divisible by num_groups, got num_channels={num_channels}, num_groups={number}"
        )
    return number


def more_than_one_value(count: int, shape: tuple[int, ...], ranks: int = 1) -> None:
    """Batch statistics of one value are refused: its deviation is 0 and its unbiased variance 0/0. Torch's text."""
    if count == 1:
        where = f"input size {shape}" if ranks == 1 else f"1 value over {ranks} ranks"
        raise ValueError(f"Expected more than 1 value per channel when training, got {where}")


def more_than_one_spatial_element(spatial: int, shape: tuple[int, ...]) -> None:
    if spatial == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {shape}")


def placement(function: str, xp: object, device: object, dtype: object) -> None:
    """Where a layer's arrays are to be, and in which dtype."""
    library = namespace(function, xp)
    floating_dtype(function, library, dtype)
    known_device(function, library, device)


def counter(function: str, x: Array, name: str, value: Array) -> None:
    """A 0-d array of x's library that counts: an integer >= 0."""
    array(function, name, value)
    same_library(function, x, name, value)
    has_shape(function, name, value, ())
    if not _array.is_integer(value):
        raise TypeError(f"{function}: {name} must have an integer dtype, got {value.dtype}")
    if int(value) < 0:
        raise ValueError(f"{function}: {name} must be >= 0, got {int(value)}")


def namespace(function: str, xp: object) -> Any:
    """`xp` (a module such as numpy or cupy, or None for NumPy) as its array-API-compatible namespace."""
    if xp is not None and not (isinstance(xp, ModuleType) and hasattr(xp, "asarray")):
        raise TypeError(f"{function}: xp must be the module of an array library, got {xp!r}")
    return _array.resolve_namespace(xp)


def floating_dtype(function: str, xp: Any, dtype: object) -> None:
    """None, or what `xp` understands as float16, bfloat16, float32 or float64 in the machine's byte order."""
    if dtype is not None and not _array.is_floating_dtype(xp, dtype):
        raise TypeError(f"{function}: dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")


def known_device(function: str, xp: Any, device: object) -> None:
    """None, or a device of `xp`."""
    if device is not None and not _array.is_device(xp, device):
        raise ValueError(f"{function}: device must be one of {xp.__name__}'s, got {device!r}")


def communicator(function: str, comm: object) -> None:
    """None or an `arraynorm.typing.Communicator`; a raw mpi4py object has to be wrapped."""
    # a class has the protocol's methods, too
    foreign = isinstance(comm, type) or _array.library(comm) == "mpi4py"
    if comm is not None and (foreign or not isinstance(comm, Communicator)):
        raise TypeError(
            f"{function}: comm must be None or a communicator, got {type(comm).__qualname__}; "
            "wrap an mpi4py one as arraynorm.distributed.MPICommunicator(comm)"
        )


def cache_of(function: str, cache: object, *kinds: type[Any]) -> None:
    """`cache` is what a matching forward returned."""
    if not isinstance(cache, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{function}: cache must be a {names}, got {type(cache).__qualname__}")


# -- quantization ----------------------------------------------------------------------------------------------


def quantized(function: str, name: str, value: object) -> None:
    array(function, name, value)
    if _array.dtype_name(value.dtype) not in ("uint8", "int8"):  # type: ignore[attr-defined]
        raise TypeError(f"{function}: {name} must have dtype uint8 or int8, got {value.dtype}")  # type: ignore[attr-defined]


def scale(function: str, name: str, value: object) -> float:
    number = real(function, name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{function}: {name} must be finite and > 0, got {number}")
    return number


def as_float32(function: str, name: str, value: object) -> float:
    """A real number rounded to float32: far out that is infinity, near zero it is zero."""
    with _array.silent():
        return float(np.float32(real(function, name, value)))


def zero_point_of_any(function: str, name: str, value: object) -> int:
    """A zero point that some 8-bit dtype can have."""
    number = integer(function, name, value)
    if not -128 <= number <= 255:
        raise ValueError(f"{function}: {name} must fit int8 or uint8, got {number}")
    return number


def zero_point(function: str, name: str, value: object, x: Array) -> int:
    number = integer(function, name, value)
    limits = _array.array_namespace(x).iinfo(x.dtype)
    if not limits.min <= number <= limits.max:
        raise ValueError(f"{function}: {name} must fit {x.dtype}, got {number}")
    return number


def is_finite(value: Array) -> bool:
    xp = _array.array_namespace(value)
    return bool(xp.all(xp.isfinite(value)))


def finite(function: str, name: str, value: Array) -> None:
    xp = _array.array_namespace(value)
    if not is_finite(value):
        wrong = float(value[~xp.isfinite(value)][0])
        raise ValueError(f"{function}: {name} must be finite (8-bit integers hold neither NaN nor inf), got {wrong}")
