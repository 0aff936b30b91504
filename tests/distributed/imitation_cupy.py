"""An imitation of the parts of CuPy that messages need: work is queued, and done when the stream is synchronized.

What is read before that is NaN, as on a device it would be whatever the memory held.
"""

from __future__ import annotations

import contextlib
import types

import numpy as np


class Stream:
    def __init__(self):
        self.queue = []
        self.synchronized = 0

    def synchronize(self):
        self.synchronized += 1
        for work in self.queue:
            work()
        self.queue.clear()


class ImitationCuPy(types.ModuleType):
    """The modules cupy and cupyx in one."""

    def __init__(self):
        super().__init__("cupy")
        self.stream = stream = Stream()
        self.pinned = []
        self.cuda = types.SimpleNamespace(get_current_stream=lambda: stream)

    def ndarray(self, host):
        array = ndarray()
        array.host, array.stream = np.asarray(host), self.stream
        return array

    def asarray(self, values, dtype=None):
        return self.ndarray(np.array(values, dtype=dtype))

    def empty(self, shape, dtype):
        return self.ndarray(np.full(shape, np.nan, dtype))

    def concatenate(self, arrays):
        result = self.empty(sum(array.size for array in arrays), np.float64)
        self.stream.queue.append(lambda: np.concatenate([array.host for array in arrays], out=result.host))
        return result

    def empty_pinned(self, size, dtype):
        self.pinned.append(np.full(size, np.nan, dtype))
        return self.pinned[-1]


class ndarray:  # noqa: N801
    """A device array, in a module whose name begins with that of the library."""

    host: np.ndarray
    stream: Stream
    device = contextlib.nullcontext()
    shape = property(lambda self: self.host.shape)
    size = property(lambda self: self.host.size)
    dtype = property(lambda self: self.host.dtype)

    def __array__(self, *_):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def _new(self, host):
        array = ndarray()
        array.host, array.stream = host, self.stream
        return array

    def reshape(self, *shape):
        return self._new(self.host.reshape(*shape))

    def astype(self, dtype, copy=True):
        return self._new(self.host.astype(dtype, copy=copy))

    def get(self, stream, out, blocking):
        assert not blocking
        assert out.flags.c_contiguous
        assert (out.dtype, out.shape) == (self.dtype, self.shape)
        stream.queue.append(lambda: np.copyto(out, self.host))

    def set(self, source, stream):
        assert (source.dtype, source.shape) == (self.dtype, self.shape)
        stream.queue.append(lambda: np.copyto(self.host, source))


ndarray.__module__ = "cupy"
