"""The array libraries that the tests run over: each is one value of the `xp` fixture."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, ExitStack
from types import ModuleType
from typing import Any, NamedTuple

import array_api_strict
import ml_dtypes
import numpy as np

from arraynorm.kernels import cpu, only
from arraynorm.kernels._kernel import Paths
from compiled import LEVELS, instructions

DTYPES = ("float64", "float32", "float16", "bfloat16")


class Namespace(NamedTuple):
    """How to make arrays of one library, and what it can hold."""

    name: str
    module: ModuleType
    dtypes: tuple[str, ...] = DTYPES
    read_only: bool = False
    paths: Paths = "any"
    """The kernels that may run on its arrays."""
    level: str | None = None
    """The C++ kernels' instructions, unless they are the best."""

    def its_kernels(self) -> AbstractContextManager[Any]:
        """For its time, no other kernels than these run."""
        with ExitStack() as stack:
            stack.enter_context(only(self.paths))
            if self.level is not None:
                stack.enter_context(instructions(self.level))
            return stack.pop_all()

    def dtype(self, name: str) -> Any:
        """The library's dtype of this name."""
        return ml_dtypes.bfloat16 if name == "bfloat16" else getattr(self.module, name)

    def asarray(self, values: Any, dtype: str | None = None) -> Any:
        """An array of its own memory; `dtype` is that of `values` unless given."""
        values = np.array(values)
        if dtype is not None:
            values = values.astype(numpy_dtype(dtype))
        array = self.module.asarray(values)
        if self.read_only:
            array.flags.writeable = False
        return array


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of this name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def to_numpy(array: Any) -> np.ndarray[Any, Any]:
    """The values of an array of any of the libraries."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def _cupy() -> ModuleType | None:
    """CuPy, where there is a device for it."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return None
    return cupy if cupy.cuda.is_available() else None


def _held_by_cupy(cupy: ModuleType) -> tuple[str, ...]:
    """All but bfloat16, where this CuPy cannot convert it from float32 and back."""
    try:
        one = cupy.ones(1, cupy.float32).astype(ml_dtypes.bfloat16).astype(cupy.float64)
        return DTYPES if float(one[0]) == 1 else DTYPES[:3]
    except Exception:  # each version has its own error
        return DTYPES[:3]


NUMPY = Namespace("numpy", np)
READ_ONLY_NUMPY = Namespace("read-only numpy", np, read_only=True)
STRICT = Namespace("array-api-strict", array_api_strict, DTYPES[:2])
NAMESPACES = [NUMPY, READ_ONLY_NUMPY, STRICT]

if (cupy := _cupy()) is not None:
    NAMESPACES.append(Namespace("cupy", cupy, _held_by_cupy(cupy)))

EVERY_PATH = NAMESPACES
"""The same, and every kernel that runs on NumPy's arrays: what is tested of numbers is tested over these."""

if cpu.native is not None:
    NUMPY_PATHS = [
        NUMPY._replace(paths="specialised"),
        *(NUMPY._replace(name=f"numpy, {level}", paths="specialised", level=level) for level in LEVELS[:-1]),
        NUMPY._replace(name="numpy, reference", paths="reference"),
        READ_ONLY_NUMPY._replace(paths="specialised"),
    ]
    EVERY_PATH = NUMPY_PATHS + [namespace for namespace in NAMESPACES if namespace.module is not np]
