"""How payloads come to MPI and back, with an imitation of CuPy: which route, and nothing read before it was written."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from arraynorm.distributed._communicator import HostCommunicator
from arraynorm.distributed._rows import Rows
from arraynorm.distributed._staging import Staging, empty, route
from distributed.imitation_cupy import ImitationCuPy

rng = np.random.default_rng(0)
mean, m2 = rng.standard_normal((2, 5))


@pytest.fixture
def cupy(monkeypatch):
    module = ImitationCuPy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupyx", module)
    return module


class Recorder(HostCommunicator):
    """Two ranks that bring the same; it keeps what it was given to send."""

    rank, size = 0, 2

    def __init__(self, cuda_aware, **settings):
        super().__init__(validate=False, **settings)
        self._staging = Staging(cuda_aware)
        self.sent = []

    def _swap(self, row):
        self.sent.append(row.whole)
        return Rows.of([row, row])

    def _gather(self, a):
        self.sent.append(a)
        gathered = empty((2, *a.shape), a)
        values = a if isinstance(a, np.ndarray) else a.host  # what MPI finds at the address
        (gathered if isinstance(gathered, np.ndarray) else gathered.host)[...] = values
        return gathered

    def _sum(self, a):
        self.sent.append(a)
        return 2 * a

    _maximum = _broadcast = None


Recorder.__abstractmethods__ = frozenset()


def test_device_memory_goes_to_mpi_on_request_only():
    assert {(library, aware): route(library, aware) for library in ("numpy", "cupy", "torch") for aware in (0, 1)} == {
        ("numpy", 0): "host",
        ("numpy", 1): "host",
        ("cupy", 0): "pinned",
        ("cupy", 1): "device",
        ("torch", 0): "host",
        ("torch", 1): "host",
    }


@pytest.mark.parametrize("cuda_aware", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_moments_and_sums_of_cupy_arrays_are_those_of_numpy_arrays(cuda_aware, dtype, cupy):
    host, device = Recorder(cuda_aware), Recorder(cuda_aware)
    arrays = mean.astype(dtype), abs(m2).astype(dtype)
    on_device = [cupy.asarray(array) for array in arrays]
    for _ in range(3):
        expected = host.merge_moments(4, *arrays)
        merged = device.merge_moments(4, *on_device)
        assert merged[0] == expected[0] == 8
        assert all(np.array_equal(a.host, b) for a, b in zip(merged[1:], expected[1:], strict=True))
        total = device.allreduce_sum(on_device[0].reshape(1, 5))
        assert np.array_equal(total.host, host.allreduce_sum(arrays[0].reshape(1, 5)))
    assert not cupy.stream.queue
    assert {isinstance(message, np.ndarray) for message in device.sent} == {not cuda_aware}


def test_sums_are_made_of_host_memory_even_if_mpi_can_read_the_device(cupy):
    device = Recorder(True, max_gathered_ranks=1)
    n, merged, _ = device.merge_moments(4, cupy.asarray(mean), cupy.asarray(abs(m2)))
    assert n == 8
    assert np.allclose(merged.host, mean, rtol=1e-15)
    assert np.array_equal(device.allreduce_sum(cupy.asarray(mean)).host, 2 * mean)
    assert all(isinstance(message, np.ndarray) for message in device.sent)


def test_the_pinned_buffer_is_kept_and_grows_to_powers_of_two(cupy):
    staging = Staging()
    for size in (3, 4, 5, 8, 2):
        message = staging.message([1.0], cupy.asarray(np.arange(float(size))))
        assert message.tolist() == [1.0, *range(size)]
    assert [buffer.size for buffer in cupy.pinned] == [4, 8]


def test_a_message_is_no_view_of_the_buffer_or_of_the_array(cupy):
    staging = Staging()
    first = staging.message([], cupy.asarray(mean))
    staging.message([], cupy.asarray(m2))
    assert np.array_equal(first, mean)
    assert not np.shares_memory(staging.message([], mean), mean)


def test_the_imitation_shows_what_is_read_too_early(cupy):
    out = np.full(5, np.nan)
    cupy.asarray(mean).get(cupy.stream, out, blocking=False)
    assert np.isnan(out).all()
    cupy.stream.synchronize()
    assert np.array_equal(out, mean)
