"""The one door to array libraries: namespaces, dtypes, views, and writing into arrays somebody else made.

Everything that depends on which library an array comes from stands here; the rest of the package speaks the
Python array API standard through the namespace that :func:`array_namespace` returns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, cast

import array_api_compat
import numpy as np

from arraynorm.typing import Array

# Narrowest first: the computation dtype is the widest of these that takes part. float16 and bfloat16 hold
# neither a sum nor a statistic, so nothing is ever computed in them.
_WIDTH = {"float16": 0, "bfloat16": 0, "float32": 1, "float64": 2}
# Libraries in which an array can be written through any view of it (so `out=` has a meaning).
_WRITABLE_LIBRARIES = ("numpy", "cupy")


def library(array: object) -> str:
    """Name of the package that `array`'s type comes from: "numpy", "cupy", "torch", ..."""
    return type(array).__module__.partition(".")[0]


def is_array(value: object) -> bool:
    """Whether `value` is an array of a supported library; NumPy's scalar types are not."""
    # NumPy's scalars and the array classes themselves have an array's attributes, too
    return array_api_compat.is_array_api_obj(value) and not isinstance(value, np.generic | type)


def is_real_scalar(value: object) -> bool:
    """Whether `value` is a real number: Python's, a NumPy scalar, or a 0-d array of any library."""
    if isinstance(value, np.ma.MaskedArray):
        return False
    if hasattr(value, "dtype"):
        return getattr(value, "ndim", None) == 0 and is_real(value)
    return hasattr(value, "__float__") and not isinstance(value, bool)


def array_namespace(array: Array) -> Any:
    """The array API namespace of `array`."""
    return _namespace_of_numpy if type(array) is np.ndarray else array_api_compat.array_namespace(array)


def resolve_namespace(xp: ModuleType | None) -> Any:
    """`xp` (a namespace module such as numpy or cupy; None is NumPy) as its array-API-compatible namespace."""
    if xp is None:
        return _namespace_of_numpy
    return array_api_compat.array_namespace(xp.asarray(0.0))


def device(array: Array) -> Any:
    """Where `array` lives, in its library's words."""
    return array_api_compat.device(array)


_namespace_of_numpy = array_api_compat.array_namespace(np.empty(0))


def cupy() -> Any:
    """The module cupy."""
    try:
        import cupy  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise RuntimeError("cuda: CuPy is not installed; pip install arraynorm[cuda13] or arraynorm[cuda12]") from error
    return cupy


# -- dtypes ----------------------------------------------------------------------------------------------------


def dtype_name(dtype: object) -> str:
    """ "float32" for every library's float32; a byte-swapped NumPy dtype keeps its mark (">f4")."""
    return _name_of_numpy_dtype(dtype) if isinstance(dtype, np.dtype) else str(dtype).rpartition(".")[2]


_name_of_numpy_dtype = functools.lru_cache(maxsize=64)(str)  # NumPy makes the name anew, in 10 us


def is_floating(array: Array) -> bool:
    """Whether the dtype is one that parameters, buffers and inputs may have.

    Asked by name: NumPy's isdtype raises on ml_dtypes.bfloat16, and array-api-strict has no float16 to compare with.
    """
    return dtype_name(array.dtype) in _WIDTH


def is_integer(array: Array) -> bool:
    """Whether the dtype is one of an array library's own integers."""
    if library(array) in _WRITABLE_LIBRARIES:
        return bool(array.dtype.kind in "iu")
    return dtype_name(array.dtype).startswith(("int", "uint"))


def holds_integers(array: Array, dtype: Any) -> bool:
    """Whether every element is an integer that `dtype` has."""
    limits = np.iinfo(dtype_name(dtype))
    numbers = [float(v) for v in to_numpy(array).reshape(-1)]
    return all(v.is_integer() and limits.min <= v <= limits.max for v in numbers)


def is_real(array: Array) -> bool:
    """Whether the dtype is an integer or floating one (of any width and byte order)."""
    if library(array) in _WRITABLE_LIBRARIES:
        return array.dtype.kind in "iuf" or is_floating(array)
    name = dtype_name(array.dtype)
    return name in _WIDTH or name.startswith(("int", "uint"))


def widest_dtype(*arrays: Array | None) -> Any:
    """The computation dtype: the widest of the arrays' dtypes and float32 (None is no array)."""
    xp = array_namespace(next(a for a in arrays if a is not None))
    width = max(_WIDTH[dtype_name(a.dtype)] for a in arrays if a is not None)
    return xp.float64 if width == _WIDTH["float64"] else xp.float32


def running_dtype(xp: Any, dtype: Any) -> Any:
    """The dtype in which a layer of `dtype` holds running statistics: at least float32, for a float16 one overflows."""
    return dtype if _WIDTH.get(dtype_name(_array_dtype(xp, dtype)), 0) else xp.float32


def is_floating_dtype(xp: Any, dtype: Any) -> bool:
    """Whether the library has this dtype, and it is one that parameters may have."""
    try:
        return dtype_name(_array_dtype(xp, dtype)) in _WIDTH
    except Exception:  # each library has its own error for what is no dtype
        return False


def is_device(xp: Any, device: Any) -> bool:
    """Whether the library can make an array there."""
    try:
        xp.empty((0,), device=device)
    except Exception:  # each library has its own error for what is no device
        return False
    return True


def _array_dtype(xp: Any, dtype: Any) -> Any:
    """What `dtype` (perhaps a type such as numpy.float16) is called as an array's dtype."""
    return xp.empty((0,), dtype=dtype).dtype


def has_float64(xp: Any) -> bool:
    """Whether the library computes in float64 (JAX does so only under `jax_enable_x64`)."""
    return xp is _namespace_of_numpy or "float64" in xp.__array_namespace_info__().dtypes(kind="real floating")


def widen(array: Array) -> Array:
    """`array` in float64, the dtype in which every reference kernel computes."""
    xp = array_namespace(array)
    return xp.astype(array, xp.float64, copy=False)


def per_channel(array: Array | None, *, axis: int, ndim: int) -> Array | None:
    """A (C,) array in float64, shaped to broadcast along `axis` of an `ndim`-dimensional view; None stays None."""
    if array is None:
        return None
    shape = [1] * ndim
    shape[axis] = -1
    return array_namespace(array).reshape(widen(array), tuple(shape))


# -- views -----------------------------------------------------------------------------------------------------


def channel_view(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """(N, C, S): everything before the channel axis, the channels, everything after it (batch norm's view)."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def sample_view(shape: tuple[int, ...], axis: int) -> tuple[int, int, int, int]:
    """(N, A, C, B): samples, spatial before the channel axis, channels, spatial after it (group norm's view)."""
    return shape[0], math.prod(shape[1:axis]), shape[axis], math.prod(shape[axis + 1 :])


def row_view(shape: tuple[int, ...], normalized_ndim: int) -> tuple[int, int]:
    """(rows, K): K elements, those of the last `normalized_ndim` dimensions, are one row (layer norm's view)."""
    split = len(shape) - normalized_ndim
    return math.prod(shape[:split]), math.prod(shape[split:])


def flat(array: Array | None) -> Array | None:
    """`array` in one dimension; None stays None."""
    return None if array is None else array_namespace(array).reshape(array, (-1,))


# -- writing ---------------------------------------------------------------------------------------------------


def store(value: Array, dtype: Any, out: Array | None) -> Array:
    """`value` rounded to `dtype`: written to `out` where there is one, else as a new array."""
    if out is None:
        xp = array_namespace(value)
        return xp.astype(value, dtype, copy=False)
    out[...] = value
    return out


def out_view(out: Array | None, shape: tuple[int, ...]) -> Array | None:
    """`out` seen in a kernel's `shape`, or None where no view of it has that shape (then `deliver` copies)."""
    if out is None:
        return None
    view = out.reshape(shape)
    return view if view.size == 0 or array_namespace(out).may_share_memory(view, out) else None


def deliver(value: Array, shape: tuple[int, ...], out: Array | None, view: Array | None) -> Array:
    """A kernel's result in the caller's `shape`; in `out` where there is one and the kernel could not write it."""
    if out is not None and view is not None:
        return out
    result = array_namespace(value).reshape(value, shape)
    if out is None:
        return result
    out[...] = result
    return out


def assign(target: Array, value: Array, *apart_from: Array) -> Array:
    """The array that now holds `value` in `target`'s dtype: `target`, or a new one where it can't be written.

    Nor is it written where its elements share memory with each other or with `apart_from`.
    """
    with silent():
        value = array_namespace(value).astype(value, target.dtype)
    if takes_out(target) and (overlaps_itself(target) or any(may_overlap(target, other) for other in apart_from)):
        return value
    if is_read_only(target):
        return value
    try:
        target[...] = value
    except TypeError:  # JAX arrays are immutable
        return value
    return target


def takes_out(array: Array) -> bool:
    """Whether the library supports `out=`."""
    return library(array) in _WRITABLE_LIBRARIES


def is_read_only(array: Array) -> bool:
    """Whether a NumPy array refuses writes (CuPy arrays have no such flag)."""
    return library(array) == "numpy" and not array.flags.writeable


def overlaps_itself(array: Array) -> bool:
    """Whether elements of a NumPy or CuPy array may share memory: a stride shorter than what lies within it."""
    reach = array.itemsize  # bytes from the first to past the last element of the dimensions so far
    for stride, n in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return bool(array.size)
        reach += (n - 1) * stride
    return False


def may_overlap(a: Array, b: Array) -> bool:
    """Whether the memory bounds of two arrays of one library intersect."""
    return bool(array_namespace(a).may_share_memory(a, b))


def is_same_memory(a: Array, b: Array) -> bool:
    """Whether two NumPy or CuPy arrays are element by element the same memory."""
    return (pointer(a), a.dtype, _steps(a)) == (pointer(b), b.dtype, _steps(b))


def _steps(array: Array) -> list[tuple[int, int]]:
    """(size, stride) of every dimension; the stride of a single element means nothing."""
    return [(n, s if n > 1 else 0) for n, s in zip(array.shape, array.strides, strict=True)]


def pointer(array: Array) -> int:
    return cast(int, array.data.ptr if library(array) == "cupy" else array.ctypes.data)


# -- moving between libraries ----------------------------------------------------------------------------------


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """A host copy (or view) of any supported library's array."""
    match library(array):
        case "cupy":
            return cast("np.ndarray[Any, Any]", array.get())
        case "torch" if dtype_name(array.dtype) == "bfloat16":  # torch refuses: NumPy itself has no bfloat16
            xp = array_namespace(array)
            import ml_dtypes

            bits: np.ndarray[Any, Any] = array.detach().cpu().view(xp.int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        case "torch":
            return cast("np.ndarray[Any, Any]", array.detach().cpu().numpy())
        case _:
            return np.asarray(array)


def from_numpy(array: np.ndarray[Any, Any], xp: Any, device: Any = None) -> Array:
    """`array` as an array of namespace `xp`, in the same dtype."""
    if dtype_name(array.dtype) == "bfloat16" and xp is not _namespace_of_numpy and hasattr(xp, "bfloat16"):
        wide = xp.asarray(array.astype(np.float32), device=device)  # exact: every bfloat16 is a float32
        return xp.astype(wide, xp.bfloat16)
    return xp.asarray(array, device=device)


def as_saved(value: Any, target: Array) -> Any:
    """`value`, or, where a file has kept only the bits of its bfloat16 elements, those elements."""
    if isinstance(value, np.ndarray) and value.dtype == np.dtype("V2") and dtype_name(target.dtype) == "bfloat16":
        import ml_dtypes

        return value.view(ml_dtypes.bfloat16)
    return value


def move(array: Array, xp: Any, device: Any = None) -> Array:
    """`array` in the library of namespace `xp` (itself where it is there already and no device is asked for)."""
    if array_namespace(array) is xp:
        return (
            array
            if device is None or device == array_api_compat.device(array)
            else array_api_compat.to_device(array, device)
        )
    return from_numpy(to_numpy(array), xp, device)


def moved_fields(fields: Iterable[Any], xp: ModuleType) -> Iterable[Any]:
    """The fields of a cache with every array moved to the library of `xp`, settings as they are."""
    namespace = resolve_namespace(xp)
    return (move(field, namespace) if is_array(field) else field for field in fields)


# -- floating-point semantics ----------------------------------------------------------------------------------


def silent() -> AbstractContextManager[Any]:
    """IEEE semantics without warnings: a NaN in a channel, or a float16 result beyond 65504, is a value, no event."""
    return np.errstate(all="ignore")
