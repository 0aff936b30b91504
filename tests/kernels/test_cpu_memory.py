"""The memory of results: aligned, recycled only when nobody has it any more, bounded, and all that a call takes."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import only
from arraynorm.kernels.reference.batch_norm import batch_norm_apply
from compiled import needs_native, succeed
from data import Host
from namespaces import NUMPY
from norms import EXAMPLES, GIVEN, Example, backward, draw, draw_dy, forward, to_library

pytestmark = needs_native

MIB = 2**20


@pytest.fixture(autouse=True)
def _none_kept() -> Iterator[None]:
    """Every test starts and ends with nothing kept, under the default limit."""
    an.release_memory()
    yield
    an.set_memory_limit(512 * MIB)
    an.release_memory()


def _copied(values: Host) -> Host:
    """A result with these values (C,), the kernels' own memory: what normalizes by mean 0 and variance 1."""
    x = values.reshape(1, 1, -1)
    with only("specialised"):
        return batch_norm_apply(x, np.zeros(1), np.ones(1), None, None, None)


def _result(mebibytes: float, fill: float = 1.0) -> Host:
    return _copied(np.full(int(mebibytes * MIB) // 4, fill, "float32"))


def _kept() -> float:
    """What is kept, in MiB."""
    kept: int = an.show_config(mode="dicts")["C++"]["memory kept"]
    return kept / MIB


def _owner(array: Host) -> Host:
    """The array whose memory this is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _handler(array: Host) -> str:
    """The name of the allocator that an array's memory is from."""
    name: str = np._core.multiarray.get_handler_name(_owner(array))
    return name


LARGE = [
    Example(op, (16, 12, 128), options | ({"normalized_shape": (128,)} if "normalized_shape" in options else {}))
    for op, _, options in EXAMPLES
]
each_large = pytest.mark.parametrize("example", LARGE, ids=lambda example: example.op)


# -- what a result is ------------------------------------------------------------------------------------------


@each_large
@pytest.mark.parametrize("dtype", ["float16", "float64"])
@only("specialised")
def test_results_begin_at_a_cache_line_and_own_their_memory(example, dtype):
    arrays, dy = to_library(NUMPY, draw(example), dtype), NUMPY.asarray(draw_dy(example), dtype)
    y, cache = forward(example, arrays)
    for result in (y, backward(example, dy, cache).dx):
        assert result.ctypes.data % 64 == 0
        assert _owner(result).flags.owndata
        assert _owner(result) is not arrays["x"]
        assert result.flags.writeable
        assert _handler(result) == "arraynorm"


def test_arrays_made_by_others_are_not_of_this_memory():
    """NumPy's allocator is replaced for the kernel's own results alone, and set back after a failure too."""
    before = _handler(np.empty(MIB))
    assert before != "arraynorm"
    result = _result(2)
    with pytest.raises(TypeError):
        batch_norm_apply(np.ones((2, 3, 4)), "mean", np.ones(3), None, None, None)
    for made in (np.empty(MIB), result.copy(), result + 1, np.empty_like(result), copy.deepcopy(result)):
        assert _handler(made) == before


@pytest.mark.parametrize("way", [np.copy, copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_result_can_be_copied_and_pickled(way):
    values = np.arange(MIB, dtype="float32")
    result = _copied(values)
    other = way(result)
    assert not np.may_share_memory(other, result)
    del result
    _result(4, fill=7.0)
    np.testing.assert_array_equal(other.reshape(-1), values)


@pytest.mark.parametrize("before", [1500, MIB // 2, 3 * MIB])
@pytest.mark.parametrize("after", [1, 1501, MIB // 2 + 1, 5 * MIB])
def test_a_result_can_be_resized(before, after):
    """NumPy's own way to grow an array, by this memory's realloc: what was there stays, and zeros follow."""
    values = np.arange(before, dtype="float32")
    _result(20, fill=9.0)  # kept, and not zero
    result = _owner(_copied(values))
    result.resize(after, refcheck=False)
    common = min(before, after)
    np.testing.assert_array_equal(result[:common], values[:common])
    assert not result[common:].any()
    assert _handler(result) == "arraynorm"
    result[...] = 3.0
    del result
    assert _kept() <= 512


# -- what is recycled ------------------------------------------------------------------------------------------


def test_a_dropped_results_memory_is_the_next_ones():
    result = _result(3)
    address = result.ctypes.data
    del result
    assert 3 <= _kept() < 3.2
    assert _is_there(_result(3), address)
    assert _is_there(_result(2.9), address)
    other = _result(3)
    assert _kept() == 0
    assert _is_there(other, address)


def _is_there(result, address):
    """Whether it begins there, give or take a page: where in one it begins depends on where its input does."""
    return abs(result.ctypes.data - address) < 4096


def test_memory_that_somebody_can_still_see_is_not_recycled():
    result = _result(3, fill=5.0)
    view = result[:, :, 1000:1010]
    exported = memoryview(_owner(result).reshape(-1)[:7])
    del result
    assert _kept() == 0
    _result(3, fill=6.0)
    assert (view == 5).all()
    del view
    assert _kept() >= 3  # the one filled with 6
    another = _result(3, fill=8.0)
    assert list(exported) == [5.0] * 7
    exported.release()
    del another
    assert _kept() >= 6


@pytest.mark.parametrize("smaller", [1.1, 2.0, 6.0])
def test_a_much_smaller_result_does_not_waste_a_large_block(smaller):
    _result(8)
    kept = _kept()
    result = _result(smaller)
    assert _kept() == kept
    assert result.size


def test_results_below_a_mebibyte_are_not_kept():
    _result(0.9)
    assert _kept() == 0


def test_what_is_recycled_is_never_in_use_twice():
    """Two hundred results, made and dropped at random: none is written by the making of another."""
    rng, alive = np.random.default_rng(0), {}
    an.set_memory_limit(12 * MIB)
    for step in range(200):
        alive[step] = _result(float(rng.choice([0.1, 1.0, 1.1, 2.0, 2.2, 4.0])), fill=float(step))
        while len(alive) > rng.integers(1, 6):
            del alive[rng.choice(list(alive))]
        for fill, array in alive.items():
            assert (array == fill).all()
        assert _kept() <= 12


def test_results_may_be_dropped_by_another_thread():
    wrong = []

    def make_and_hand_over(number: int) -> None:
        for step in range(30):
            mine = _result(1.5, fill=float(number))
            theirs, shelf[number] = shelf[(number + step) % 4], mine
            if theirs is not None and len(np.unique(theirs)) != 1:
                wrong.append(step)

    shelf: list[Any] = [None] * 4
    others = [threading.Thread(target=make_and_hand_over, args=(number,)) for number in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert not wrong


# -- how much --------------------------------------------------------------------------------------------------


def test_no_more_is_kept_than_the_limit_and_the_oldest_goes_first():
    an.set_memory_limit(7 * MIB)
    assert an.show_config(mode="dicts")["C++"]["memory limit"] == 7 * MIB
    alive = [_result(3), _result(3.9), _result(2.2)]
    addresses = [result.ctypes.data for result in alive]
    for result in range(3):
        alive[result] = None
        assert _kept() <= 7
    del result
    assert 6 < _kept() <= 7
    assert _is_there(_result(3.9), addresses[1])
    assert _is_there(_result(2.2), addresses[2])


def test_a_result_above_the_limit_is_not_kept_and_drives_nothing_out():
    an.set_memory_limit(4 * MIB)
    _result(3)
    kept = _kept()
    _result(5)
    assert _kept() == kept > 0


def test_a_lower_limit_gives_back_at_once_and_zero_keeps_nothing():
    a, b = _result(3), _result(2)
    del a, b
    assert _kept() >= 5
    an.set_memory_limit(4 * MIB)
    assert 1 < _kept() < 4
    an.set_memory_limit(0)
    assert _kept() == 0
    _result(3)
    assert _kept() == 0


def test_memory_is_released_when_asked_for_and_kept_again_after():
    _result(3)
    assert _kept() > 0
    an.release_memory()
    assert _kept() == 0
    an.release_memory()
    _result(3)
    assert _kept() > 0


def test_a_result_outlives_the_limit_and_the_release():
    values = np.arange(MIB, dtype="float32")
    result = _copied(values)
    an.set_memory_limit(0)
    an.release_memory()
    _result(4, fill=7.0)
    np.testing.assert_array_equal(result.reshape(-1), values)
    del result
    assert _kept() == 0


@pytest.mark.parametrize(("nbytes", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError)])
def test_a_limit_that_cannot_be_is_refused(nbytes, error):
    with pytest.raises(error, match=r"^set_memory_limit: nbytes must be "):
        an.set_memory_limit(nbytes)
    assert an.show_config(mode="dicts")["C++"]["memory limit"] == 512 * MIB
    an.set_memory_limit(2**80)
    assert an.show_config(mode="dicts")["C++"]["memory limit"] >= 2**60


# -- nothing is left behind ------------------------------------------------------------------------------------


@each_large
def test_calls_leave_no_object_and_no_reference_behind(example):
    """Whether they succeed or fail, in new memory or the caller's."""
    arrays = to_library(NUMPY, draw(example), "float32")
    y, cache = forward(example, arrays)
    wide, turned, dy = NUMPY.asarray(draw_dy(example)), np.asfortranarray(y), y.copy()

    def call() -> None:
        for out in (None, np.empty_like(y), np.empty_like(turned)):
            forward(example, arrays, out=out)
            backward(example, wide, cache, out=out)
            backward(example, turned, cache)
        with contextlib.suppress(TypeError):
            batch_norm_apply(dy[:, :, :1], arrays["weight"], "rstd", None, None, None)

    given = [*arrays.values(), y, wide, turned, dy, np.dtype("float32"), np.dtype("float64")]
    for _ in range(20):  # until caches are warm
        call()
    gc.collect()
    before = [sys.getallocatedblocks(), *map(sys.getrefcount, given)]
    rounds = 300  # Python's own caches move by some hundred objects, however many rounds
    for _ in range(rounds):
        call()
    gc.collect()
    after = [sys.getallocatedblocks(), *map(sys.getrefcount, given)]
    assert all(b - a < rounds for a, b in zip(before, after, strict=True)), (before, after)


# -- peaks -----------------------------------------------------------------------------------------------------

# The peak of the resident memory during a call beyond what was resident before, for arrays of 8 Mi elements.
PEAK = """
import numpy as np
import arraynorm as an
from arraynorm.kernels import only
from namespaces import NUMPY, numpy_dtype
from norms import GIVEN, Example, backward, forward

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def peak(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what there is now
    before = resident("VmRSS")
    result = call()
    return result, resident("VmHWM") - before

def arrays(example, dtype):
    op, shape, options = example
    parameter_shape = options.get("normalized_shape") or (shape[options.get("axis", 1)],)
    sizes = {name: shape if name == "addend" else parameter_shape for name in GIVEN[op]}
    sizes = {"x": shape} | sizes | {"dy": shape}
    return {name: np.full(size, i + 1, numpy_dtype(dtype)) for i, (name, size) in enumerate(sizes.items())}

def measure(example, dtype):
    given = arrays(example, dtype)
    dy = given.pop("dy")
    (y, cache), forward_peak = peak(lambda: forward(example, given))
    own = [a.nbytes for name, a in cache._asdict().items() if isinstance(a, np.ndarray) and name not in given]
    forward_size = y.nbytes + sum(own)
    del y
    gradients, backward_peak = peak(lambda: backward(example, dy, cache))
    backward_size = sum(a.nbytes for a in gradients)
    return forward_peak, forward_size, backward_peak, backward_size

an.set_num_threads(3)
an.set_memory_limit(0)
with only("specialised"):
    for dtype in ("float16", "float32", "float64"):
        measure(SMALL, dtype)  # which starts threads, and imports what is imported late
        print(*measure(LARGE, dtype))
"""

PEAKS = [
    *(Example(op, (16, 64, 8192)) for op in GIVEN if op.startswith(("batch", "instance"))),
    Example("batch_norm_add_relu", (16, 8192, 64), {"axis": -1}),
    Example("group_norm", (16, 64, 8192), {"num_groups": 8}),
    Example("group_norm", (16, 8192, 64), {"num_groups": 8, "axis": -1}),
    Example("layer_norm", (8192, 1024), {"normalized_shape": (1024,)}),
    Example("rms_norm", (8192, 1024), {"normalized_shape": (1024,)}),
]

# A temporary of x's size, 16 MiB in float16, is far above this: two results rounded up to huge pages of 2 MiB, and the
# stacks and sums of three threads.
SLACK = 6 * MIB


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("example", PEAKS, ids=str)
def test_a_call_takes_the_memory_of_its_results_and_no_more(example):
    small = example._replace(shape=(4, *example.shape[1:]))
    printed = succeed(PEAK.replace("SMALL", repr(small)).replace("LARGE", repr(example)))
    for line in printed.splitlines():
        forward_peak, forward_size, backward_peak, backward_size = map(int, line.split())
        assert forward_size <= forward_peak + SLACK  # or nothing has been measured
        assert forward_peak <= forward_size + SLACK
        assert backward_peak <= backward_size + SLACK
