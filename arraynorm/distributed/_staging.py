"""How the numbers of a payload come from an array to MPI and back: for CuPy arrays through pinned host memory.

The CuPy routes are tested with an imitation of CuPy only: not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from arraynorm import _array
from arraynorm.distributed._moments import Float64Array
from arraynorm.typing import Array

Route = Literal["host", "pinned", "device"]


def route(library: str, cuda_aware: bool) -> Route:
    """Where a message of arrays of `library` lies when MPI is given it."""
    if library != "cupy":
        return "host"
    return "device" if cuda_aware else "pinned"


class Staging:
    """The way to MPI and back of one communicator's payloads, which one thread at a time makes.

    Work on CuPy arrays is only queued when a kernel returns: the stream is synchronized before MPI reads, and before
    the pinned buffer, which is kept since it is expensive to allocate, is written to again.

    Parameters
    ----------
    cuda_aware : bool
        Whether MPI may be given the address of device memory, which crashes an MPI that was not built for it. It is
        used to gather messages; sums are made of host memory, for Open MPI's nonblocking reductions take no other.
    """

    def __init__(self, cuda_aware: bool = False) -> None:
        self.cuda_aware = cuda_aware
        self._pinned: Float64Array = np.empty(0)

    def message(self, head: Sequence[float], *arrays: Array) -> Any:
        """[*head, *arrays] as one new float64 vector, to be gathered: on the host, or the device if MPI may read it."""
        if route(_array.library(arrays[0]), self.cuda_aware) != "device":
            return self.host_message(head, *arrays)
        cupy = _array.cupy()
        with arrays[0].device:
            flat = [array.reshape(-1).astype(np.float64, copy=False) for array in arrays]
            vector = cupy.concatenate([cupy.asarray(head, dtype=np.float64), *flat])
            cupy.cuda.get_current_stream().synchronize()
        return vector

    def host_message(self, head: Sequence[float], *arrays: Array) -> Float64Array:
        """[*head, *arrays] as one new float64 vector on the host."""
        flat = [np.reshape(array, -1) for array in self.on_host(arrays)]
        return np.concatenate([head, *flat], dtype=np.float64)

    def sends_device_memory(self, array: Array) -> bool:
        return self.cuda_aware and route(_array.library(array), True) == "device"

    def gathered(self, messages: Any) -> Any:
        """What was gathered, on the host: a view that is good until the next call."""
        return self.on_host([messages])[0].reshape(messages.shape)

    def like(self, array: Array, host: Float64Array) -> Array:
        """`host` in the library and on the device of `array`."""
        if type(array) is np.ndarray:
            return host
        if _array.library(array) != "cupy":
            return _array.from_numpy(host, _array.array_namespace(array), _array.device(array))
        cupy = _array.cupy()
        with array.device:
            stream = cupy.cuda.get_current_stream()
            pinned = self._buffer(host.size)
            pinned[...] = host.reshape(-1)
            result = cupy.empty(host.shape, dtype=np.float64)
            result.set(pinned.reshape(host.shape), stream=stream)
            stream.synchronize()
        return result

    def on_host(self, arrays: Sequence[Array]) -> Sequence[Any]:
        """Arrays of one library as NumPy arrays; those of CuPy are flat views, good until the next call."""
        if type(arrays[0]) is np.ndarray:
            return arrays
        if _array.library(arrays[0]) != "cupy":
            return [_array.to_numpy(array) for array in arrays]
        with arrays[0].device:
            stream = _array.cupy().cuda.get_current_stream()
            ends = np.cumsum([array.size for array in arrays])
            parts = np.split(self._buffer(int(ends[-1])), ends[:-1])
            for array, part in zip(arrays, parts, strict=True):
                flat = array.reshape(-1).astype(np.float64, copy=False)
                flat.get(stream=stream, out=part, blocking=False)
            stream.synchronize()
        return parts

    def _buffer(self, size: int) -> Float64Array:
        """`size` elements of the pinned buffer, which grows to the next power of two."""
        if self._pinned.size < size:
            import cupyx  # type: ignore[import-not-found,import-untyped,unused-ignore]

            self._pinned = cupyx.empty_pinned(1 << (size - 1).bit_length(), dtype=np.float64)
        return self._pinned[:size]


def empty(shape: tuple[int, ...], like: Any) -> Any:
    """An array for messages of the dtype of `like` to be gathered in, where `like` lies."""
    if _array.library(like) != "cupy":
        return np.empty(shape, like.dtype)
    with like.device:
        return _array.cupy().empty(shape, dtype=like.dtype)
