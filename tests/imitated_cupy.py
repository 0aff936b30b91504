"""An imitation of CuPy whose arrays lie in host memory and whose kernels run in the emulator of tests/cuda.

What CuPy refuses, it refuses: arrays of the host among its own, conversions to NumPy that nobody asked for, arguments
of kernels that are pointers to host memory. What it cannot show: streams, the bits of a device, its speed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import array_api_compat
import array_api_compat.numpy
import numpy as np

from arraynorm.kernels.cuda import _loader
from arraynorm.kernels.cuda._instances import Instance
from cuda.emulated import LARGE, module_of

CURRENT = [0]
"""The stack of current devices."""
COUNT = 2
_one_at_a_time = threading.Lock()  # the emulator has one set of fibers
launched: list[tuple[str, int]] = []
"""Kernels, and the devices that were current."""


class Device:
    """cupy.cuda.Device"""

    def __init__(self, device: Any = None):
        self.id = CURRENT[-1] if device is None else int(device)
        if not 0 <= self.id < COUNT:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __enter__(self):
        CURRENT.append(self.id)
        return self

    def __exit__(self, *_):
        CURRENT.pop()


def _host(value: Any) -> Any:
    """The host's arrays in place of ours; the host's own are refused, as by CuPy."""
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, tuple | list):
        return type(value)(_host(one) for one in value)
    return value


def _ours(value: Any, device: int | None = None) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return ndarray(np.asarray(value), CURRENT[-1] if device is None else device)
    return tuple(_ours(one, device) for one in value) if type(value) is tuple else value


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801
    """cupy.ndarray"""

    __array_priority__ = 100

    def __init__(self, host: np.ndarray[Any, Any], device: int):
        self.host, self.device = host, Device(device)
        self.data = SimpleNamespace(ptr=host.ctypes.data)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("ctypes", "base", "tofile", "host"):
            raise AttributeError(name)
        found = getattr(self.host, name)
        if not callable(found):
            return _ours(found, self.device.id) if isinstance(found, np.ndarray) else found
        return lambda *given, **options: _ours(
            found(*_host(given), **{k: _host(v) for k, v in options.items()}), self.device.id
        )

    def get(self, stream=None, order="C", out=None, blocking=True):
        if out is None:
            return self.host.copy(order)
        assert (out.shape, out.dtype) == (self.host.shape, self.host.dtype)
        np.copyto(out, self.host)
        return out

    def set(self, array, stream=None):
        assert (array.shape, array.dtype) == (self.host.shape, self.host.dtype)
        np.copyto(self.host, array)

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        into = {} if out is None else {"out": _host(out)}
        result = getattr(ufunc, method)(*_host(inputs), **into, **options)
        return _ours(result, self.device.id) if out is None else out[0]

    def __array_function__(self, function, types, given, options):
        return _ours(function(*_host(given), **{k: _host(v) for k, v in options.items()}), self.device.id)

    def __getitem__(self, key):
        return _ours(self.host[_host(key)], self.device.id)

    def __setitem__(self, key, value):
        self.host[_host(key)] = _host(value)

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __float__(self):
        return float(self.host)

    def __int__(self):
        return int(self.host)

    def __bool__(self):
        return bool(self.host)

    def __index__(self):
        return self.host.__index__()


ndarray.__module__ = "cupy"  # where arraynorm sees the library of an array


class RawModule:
    """cupy.RawModule"""

    def __init__(self, *, code: str, options: tuple[str, ...], backend: str, name_expressions: tuple[str, ...]):
        assert backend == "nvrtc"
        assert isinstance(options, tuple)
        self.names = name_expressions
        (self.file,) = {one for one in _loader.source_hashes() if _loader.source(one) == code}

    def get_function(self, name: str) -> Any:
        assert name in self.names
        kernel = module_of(Instance(self.file, name)).kernel(name)

        def launch(grid, block, arguments, *, shared_mem=0):
            for one in arguments:
                ours = isinstance(one, ndarray) and one.device.id == CURRENT[-1]
                by_value = isinstance(one, np.generic) or (isinstance(one, np.ndarray) and one.dtype.names)
                assert one is None or ours or (by_value and one.size == 1), one
            launched.append((name, CURRENT[-1]))
            with _one_at_a_time:
                kernel(grid, block, [one.host if isinstance(one, ndarray) else one for one in arguments], shared_mem)

        launch.shared_size_bytes = 0
        return launch


class Stream:
    """cupy.cuda.Stream: all is done at once."""

    def __init__(self, null=False, non_blocking=False):
        self.ptr = 1

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Event:
    """cupy.cuda.Event"""

    def record(self, stream=None):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass


_PROPERTIES = {
    "name": b"An imitation",
    "major": 9,
    "minor": 0,
    "multiProcessorCount": LARGE.processors,
    "sharedMemPerBlockOptin": LARGE.shared_bytes,
}


class ImitatedCuPy(ModuleType):
    """The modules cupy, cupyx and array_api_compat.cupy in one."""

    __version__ = "0"
    ndarray, RawModule = ndarray, RawModule
    cuda = SimpleNamespace(
        Device=Device,
        Event=Event,
        Stream=Stream,
        get_current_stream=Stream,
        get_elapsed_time=lambda start, end: 1e3 * (end.seconds - start.seconds),
        is_available=lambda: True,
        memory=SimpleNamespace(OutOfMemoryError=MemoryError),
        runtime=SimpleNamespace(
            getDeviceProperties=lambda number: _PROPERTIES,
            getDeviceCount=lambda: COUNT,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13000,
        ),
    )

    @staticmethod
    def _as_strided(array, shape, strides):
        return _ours(np.lib.stride_tricks.as_strided(array.host, shape, strides), array.device.id)

    lib = SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=_as_strided))

    @staticmethod
    def empty_pinned(shape, dtype):  # cupyx's
        return np.empty(shape, dtype)

    @staticmethod
    def get_default_memory_pool():
        return SimpleNamespace(free_all_blocks=lambda: None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(array_api_compat.numpy, name)
        if isinstance(found, type) or not callable(found):
            return found  # a dtype, a number

        def function(*given, device=None, **options):
            with Device(next((a.device for a in given if isinstance(a, ndarray)), None) if device is None else device):
                return _ours(found(*_host(given), **{k: _host(v) for k, v in options.items()}))

        return function

    def __array_namespace_info__(self):
        return array_api_compat.numpy.__array_namespace_info__()

    def asarray(self, values, dtype=None, *, device=None, copy=None):
        """To the device from the host, too."""
        if isinstance(values, ndarray):
            same = dtype is None or values.dtype == dtype
            return values if same and not copy else values.astype(values.dtype if dtype is None else dtype)
        with Device(device):
            return _ours(np.array(values, dtype))


CUPY = ImitatedCuPy("cupy")
CUPY.__spec__ = ModuleSpec("cupy", None)  # importlib.util.find_spec("cupy") finds it


@contextmanager
def imitated_cupy() -> Iterator[ImitatedCuPy]:
    """In this context `import cupy` finds the imitation, and its kernels are compiled for the emulator."""

    def to_device(array, device, stream=None):
        if not isinstance(device, Device):
            raise ValueError(f"Unsupported device {device!r}")
        return ndarray(array.host.copy("K"), device.id)

    modules = {"cupy": CUPY, "cupyx": CUPY, "array_api_compat.cupy": CUPY}
    caches = (_loader.compiled, _loader.properties)
    for cache in caches:
        cache.cache_clear()
    launched.clear()
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(array_api_compat, "cupy", CUPY, create=True),
        mock.patch.object(array_api_compat, "to_device", to_device),
    ):
        yield CUPY
    for cache in caches:
        cache.cache_clear()
