"""What only a device can show: its bits are the emulator's, streams and capture work, devices are kept apart."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import only
from arraynorm.kernels.cuda import _loader, instances, warm_up
from cuda.emulated import emulated
from cuda.examples import RUNS, Run
from gpu.on_device import held_dtypes, results, to_device
from namespaces import to_numpy

EACH_RUN = [(dtype, run) for dtype, runs in RUNS.items() for run in runs(dtype) if run.device == "large"]


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="needs CuPy")


@pytest.mark.parametrize(("dtype", "run"), EACH_RUN, ids=str)
def test_a_device_gives_the_bits_of_the_emulator(dtype, run: Run):
    """The same plans, and float64 arithmetic that is rounded as on the CPU."""
    if dtype not in held_dtypes():
        pytest.skip(f"this CuPy does not carry {dtype}")
    arrays, dy = run.arrays(dtype)
    with emulated(_loader.properties(0)):
        wanted = results(run, arrays, dy)
    given, dy = {name: to_device(array) for name, array in arrays.items()}, to_device(dy)
    for _ in range(3):
        with only("specialised"):
            found = results(run, given, dy)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert to_numpy(value).tobytes() == np.ascontiguousarray(wanted[name]).tobytes(), name


def test_all_instances_can_be_compiled_ahead_of_time(cupy):
    assert warm_up() == len(list(instances()))


def test_work_goes_to_the_current_stream(cupy):
    """A kernel on a stream that waits for an event runs after it, and before what comes later on its stream."""
    before, after, later = (cupy.asarray(_normal(seed, 2048, 4096)) for seed in range(3))
    wanted = an.layer_norm(after, 4096)
    x = before.copy()
    cupy.cuda.Device().synchronize()
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with first:
        for _ in range(200):
            x += 0.01
        x[...] = after
        done = first.record()
    second.wait_event(done)
    with second:
        y = an.layer_norm(x, 4096)
        x[...] = later
    second.synchronize()
    cupy.testing.assert_array_equal(y, wanted)
    assert not (wanted == an.layer_norm(before, 4096)).all()


@pytest.mark.parametrize("op", ["layer_norm", "batch_norm"])
def test_a_training_step_can_be_captured_and_replayed(cupy, op):
    """The graph's memory comes from a pool of its own, as CuPy asks for."""
    options = {"normalized_shape": 512} if op == "layer_norm" else {}
    x, dy = (cupy.asarray(_normal(seed, 256, 512)) for seed in (0, 1))
    forward, backward = getattr(an, f"{op}_forward"), getattr(an, f"{op}_backward")

    def step():
        y, cache = forward(x, **options)
        return y, backward(dy, cache).dx

    pool = cupy.cuda.MemoryPool()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(pool.malloc):
        step()  # compiled and allocated before
        stream.begin_capture()
        y, dx = step()
        graph = stream.end_capture()
    stale = y.copy()
    x[...] = cupy.asarray(_normal(2, 256, 512))
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    for replayed, wanted in zip((y, dx), step(), strict=True):
        cupy.testing.assert_array_equal(replayed, wanted)
    assert not (stale == y).all()


def test_arrays_of_host_and_device_are_not_mixed(cupy):
    with pytest.raises(TypeError, match="weight"):
        an.batch_norm(cupy.ones((4, 3)), np.ones(3))


def test_work_goes_to_the_device_of_x(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    with cupy.cuda.Device(1):
        x = cupy.arange(12.0).reshape(4, 3)
    y, cache = an.batch_norm_forward(x)
    assert {y.device.id, cache.mean.device.id, an.batch_norm_backward(x, cache).dx.device.id} == {1}


def test_a_layer_moves_to_the_device_and_back(cupy):
    layer, x = an.BatchNorm2d(3), np.random.default_rng(0).standard_normal((4, 3, 5, 5), dtype=np.float32)
    wanted = layer(x)
    layer = an.BatchNorm2d(3).cuda()
    y = layer(cupy.asarray(x))
    np.testing.assert_allclose(to_numpy(y), wanted, rtol=2e-7, atol=1e-7)
    assert isinstance(layer.cpu().running_mean, np.ndarray)
