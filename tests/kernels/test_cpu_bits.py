"""The C++ kernels give the same bits at any number of threads, from run to run, and by any of their ways there."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SELF
from arraynorm.kernels import only
from arraynorm.kernels.reference import batch_norm as bn
from arraynorm.kernels.reference import batch_norm_add_relu as fused
from arraynorm.kernels.reference import quantized_batch_norm as quantized
from arraynorm.kernels.reference.moments import reciprocal_std
from compiled import each_level, instructions, needs_native, succeed, threads
from data import Host
from namespaces import DTYPES, numpy_dtype
from norms import GIVEN, Example, backward, forward

pytestmark = needs_native

# Each takes another way through batch norm's kernels, at 2, 3 or 8 threads. All are above the size from which a call
# uses threads, 256 KiB read and written. S and C * S are no multiples of 8 unless it says so: rows share bytes.
VOLUMES = {
    "few channels of long planes, in parts": (3, 2, 100003),
    "few channels of many samples, in parts": (401, 3, 703),
    "one channel": (3, 1, 100003),
    "channels for two threads and too few for eight": (5, 9, 28001),
    "many channels": (6, 67, 257),
    "sums sample by sample, whole pages apart": (65, 512, 64),
    "sums sample by sample, of large channels": (513, 2, 1027),
    "small planes, by tiles": (129, 43, 49),
    "small planes of few samples, given statistics by tiles but for eight threads": (17, 467, 13),
    "two-dimensional, by tiles": (301, 515),
    "two-dimensional, by rows": (9001, 117),
    "two-dimensional, by rows, of whole bytes of the mask": (4100, 256),
    "channels last": (9, 33, 31, 117),
}
ROWS = {"short rows": (1501, 77), "long rows": (67, 5003), "few very long rows": (3, 100003), "one row": (1, 300007)}
GROUPS = {
    "many small groups": (17, 64, 149),
    "few large groups": (2, 4, 40009),
    "one group to a sample": (7, 6, 3001),
    "channels last": (4, 33, 31, 36),
}


def _examples() -> dict[str, Example]:
    found = {}
    for op in GIVEN:
        volumes = ROWS if op in ("layer_norm", "rms_norm") else VOLUMES if op.startswith("batch_norm") else GROUPS
        for name, shape in volumes.items():
            options: dict[str, Any] = {"axis": -1} if name == "channels last" else {}
            if volumes is ROWS:
                options = {"normalized_shape": shape[1:]}
            elif op == "group_norm":
                options["num_groups"] = {"many small groups": 32, "channels last": 4, "few large groups": 2}.get(
                    name, 1
                )
            found[f"{op}, {name}"] = Example(op, shape, options)
    return found


EXAMPLES = _examples()
each_route = pytest.mark.parametrize("route", EXAMPLES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@functools.cache
def _numbers(seed: int) -> Host:
    """Far enough from zero that a sum in another order differs."""
    numbers = np.random.default_rng(seed).standard_normal(2_200_000) * 3 + 1
    numbers.flags.writeable = False
    return numbers


def _draw(example: Example, dtype: str) -> dict[str, Host]:
    """x, the parameters and dy, all in `dtype`."""
    op, shape, options = example
    parameter_shape = options.get("normalized_shape") or (shape[options.get("axis", 1)],)
    found = {}
    for seed, name in enumerate(("x", *GIVEN[op], "dy")):
        size = shape if name in ("x", "addend", "dy") else parameter_shape
        numbers = _numbers(seed)[: np.prod(size)].reshape(size).astype(numpy_dtype(dtype))
        found[name] = abs(numbers) if name == "var" else numbers
    return found


def _run(example: Example, arrays: dict[str, Host], **more: Any) -> dict[str, Host]:
    """Whatever the op, its cache and its backward compute, in C++."""
    given = {name: array for name, array in arrays.items() if name != "dy"}
    with only("specialised"):
        y, cache = forward(example, given, **more)
        gradients = backward(example, arrays["dy"], cache)
    found = {"y": y}
    for name, value in [*cache._asdict().items(), *gradients._asdict().items()]:
        if isinstance(value, np.ndarray) and name not in given:
            found[name] = value
    return found


def _assert_same_bits(actual: dict[str, Host], wanted: dict[str, Host]) -> None:
    assert actual.keys() == wanted.keys()
    for name, array in wanted.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].tobytes() == array.tobytes(), name


# -- threads ---------------------------------------------------------------------------------------------------


@each_route
@each_dtype
@each_level
def test_any_number_of_threads_gives_the_same_bits(route, dtype, level):
    example, arrays = EXAMPLES[route], _draw(EXAMPLES[route], dtype)
    with instructions(level):
        with threads(1):
            wanted = _run(example, arrays)
        for number in (2, 3, 8):
            with threads(number):
                _assert_same_bits(_run(example, arrays), wanted)


@pytest.mark.parametrize("route", [name for name in EXAMPLES if name.startswith(("batch_norm_add_relu,", "layer"))])
def test_every_run_gives_the_same_bits(route):
    """A sum in the order in which threads finish would show some time, and so would a byte of the mask that is lost."""
    example, arrays = EXAMPLES[route], _draw(EXAMPLES[route], "float32")
    with threads(8):
        wanted = _run(example, arrays)
        for _ in range(10):
            _assert_same_bits(_run(example, arrays), wanted)


@each_dtype
@pytest.mark.parametrize("op", ["quantized_batch_norm", "quantized_batch_norm_relu"])
@pytest.mark.parametrize("shape", [(6, 67, 1571), (9001, 117), (1, 2, 300007)])
def test_any_number_of_threads_gives_the_same_levels(op, shape, dtype):
    xq = np.resize(np.arange(-128, 128, dtype=np.int8), shape)
    given = [_numbers(i)[: shape[1]].astype(numpy_dtype(dtype)) for i in range(4)]
    given[1] = abs(given[1])
    options = {"x_scale": 0.05, "x_zero_point": 3, "y_scale": 0.04, "y_zero_point": -5}
    found = set()
    for number in (1, 2, 3, 8):
        with threads(number), only("specialised"):
            found.add(getattr(an, op)(xq, *given, **options).tobytes())
    assert len(found) == 1


# Lines (a, b) per channel: easy ones; exact ties, which float64 rounds on the way; next to a tie, on either side; and
# what floats can't hold.
_LINES = [(0.7, 0.3), (-1.3, 0.1), (1.0, 0.0), (0.32, 0.02), (0.4, 0.02 + 1e-9), (0.4, 0.02 - 1e-9), (0.0, 0.06)]
_LINES += [(0.8 * (1 + 1e-8), 0.02), (1e-300, 1e-300), (1e12, 5e13), (1e-12, -1e30), (1e300, -1e300)]


@pytest.mark.parametrize("op", ["quantized_batch_norm", "quantized_batch_norm_relu"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("zero_points", [(0, 0), (3, 100), (127, 5)], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 145), (40, 12, 9), (300, 12, 1), (1, 12, 300), (3, 12, 2)], ids=str)
@each_level
def test_quantized_levels_are_those_of_the_reference(op, dtype, zero_points, shape, level):
    """Next to ties too, wherever the elements of a channel stand, and where they are written over."""
    levels = np.resize(np.arange(256, dtype=np.uint8), shape[0] * shape[2] * 12).astype(dtype)
    x = np.ascontiguousarray(np.swapaxes(levels.reshape(12, shape[0], shape[2]), 0, 1))
    a, b = np.array(_LINES).T.copy()
    kernel, options = getattr(quantized, op), (0.05, zero_points[0], 0.04, zero_points[1])
    with only("reference"):
        wanted = kernel(x, a, b, *options, None)
    last = np.moveaxis(x, 1, 2).copy()
    with instructions(level), only("specialised"):
        np.testing.assert_array_equal(kernel(x, a, b, *options, None), wanted)
        np.testing.assert_array_equal(kernel(np.moveaxis(last, 2, 1), a, b, *options, None), wanted)
        for place in (x, np.moveaxis(last, 2, 1)):
            assert kernel(place, a, b, *options, place) is place
            np.testing.assert_array_equal(place, wanted)


# -- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [name for name in EXAMPLES if np.prod(EXAMPLES[name].shape) < 500_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_an_array_lies_in_a_cache_line_does_not_matter(route, dtype):
    """Or two runs would differ by what the allocator returns."""

    def shifted(array: Host, shift: int) -> Host:
        elsewhere = np.empty(array.size + 64, array.dtype)
        to_line = -elsewhere.ctypes.data % 64 // array.itemsize
        view = elsewhere[to_line + shift :][: array.size].reshape(array.shape)
        view[...] = array
        return view

    example, arrays = EXAMPLES[route], _draw(EXAMPLES[route], dtype)
    wanted = _run(example, {name: shifted(array, 0) for name, array in arrays.items()})
    for shift in (1, 13):
        _assert_same_bits(_run(example, {name: shifted(array, shift) for name, array in arrays.items()}), wanted)


# From so many bytes read and written on results are streamed whatever the cache: see exceeds_cache in caches.cpp.
_STREAMED = 48 << 20


@pytest.mark.parametrize("sample", [(5, 1027), (3, 70001), (64,), (37,), (24, 6)], ids=str)
@pytest.mark.parametrize("op", ["batch_norm_frozen", "batch_norm_add_relu_frozen"])
def test_results_that_bypass_the_cache_are_those_that_do_not(op, sample):
    """Given statistics, every sample is by itself: many equal ones, above the size of the cache, and one."""
    one = Example(op, (1, *sample))
    arrays = _draw(one, "float32")
    samples = _STREAMED // (2 * arrays["x"].nbytes) + 3  # x and y together are larger

    def repeated(array: Host) -> Host:
        return np.repeat(array, samples, axis=0)

    many = {name: repeated(a) if a.shape == one.shape else a for name, a in arrays.items()} | {"addend": None}
    if "addend" not in arrays:
        many.pop("addend")
    else:
        arrays["addend"] = None
    wanted = _run(one, arrays)
    result = _run(one._replace(shape=(samples, *sample)), many)
    for name in ("y", "dx"):
        assert (result[name].view("uint32") == wanted[name].view("uint32")).all(), name
    if "mask" in wanted:
        bits = [np.unpackbits(r["mask"], bitorder="little") for r in (wanted, result)]
        size = int(np.prod(sample))
        assert (bits[1][: samples * size].reshape(samples, size) == bits[0][:size]).all()


# What bypasses the cache: rows and planes that begin and end anywhere in a cache line, and adjacent rows of columns.
STREAMED: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    "rows": ((1027,), lambda x, w, out: an.layer_norm_forward(x, 1027, w, w, out=out), an.layer_norm_backward),
    "rows of an even size": ((2048,), lambda x, w, out: an.rms_norm_forward(x, 2048, w, out=out), an.rms_norm_backward),
    "rows of RMS norm": ((1027,), lambda x, w, out: an.rms_norm_forward(x, 1027, w, out=out), an.rms_norm_backward),
    "groups of short runs": (
        (12, 3),
        lambda x, w, out: an.group_norm_forward(x, 4, w, w, out=out),
        an.group_norm_backward,
    ),
    "short rows": ((8,), lambda x, w, out: an.layer_norm_forward(x, 8, w, w, out=out), an.layer_norm_backward),
    "planes": ((3, 713), lambda x, w, out: an.instance_norm_forward(x, w, w, out=out), an.instance_norm_backward),
    "columns": (
        (37, 20),
        lambda x, w, out: an.instance_norm_forward(x, w, w, axis=-1, out=out),
        an.instance_norm_backward,
    ),
    "given statistics, columns": (
        (7, 24),
        lambda x, w, out: an.batch_norm_frozen_forward(x, 0 * w, w, w, w, axis=-1, out=out),
        an.batch_norm_frozen_backward,
    ),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("case", STREAMED)
@each_level
def test_what_bypasses_the_cache_goes_where_it_should_and_nowhere_else(case, dtype, level):
    """Into memory that begins at any element of a cache line; each sample's bits are those of some samples alone."""
    sample, run_forward, run_backward = STREAMED[case]
    channels = sample[0] if case in ("planes", "groups of short runs") else sample[-1]
    rng = np.random.default_rng(11)
    x, dy = rng.standard_normal((2, 6, *sample)).astype(numpy_dtype(dtype))
    w = rng.uniform(0.5, 2, channels)
    times = _STREAMED // (2 * x.nbytes) + 2
    bits = f"uint{8 * x.itemsize}"
    with instructions(level), threads(2):
        y, cache = run_forward(x, w, None)
        dx = run_backward(dy, cache).dx
        many, many_dy = (np.concatenate([a] * times) for a in (x, dy))
        cache = run_forward(many, w, None)[1]
        buffer = np.empty(many.size + 128, x.dtype)
        for shift in (0, 1, 5, 16 // x.itemsize):
            start = 64 + -buffer.ctypes.data % 64 // buffer.itemsize + shift
            before, out, after = np.split(buffer, [start, start + many.size])
            out = out.reshape(many.shape)
            for run, wanted in ((run_forward, y), (run_backward, dx)):
                buffer[...] = 7
                run(many, w, out) if run is run_forward else run(many_dy, cache, out=out)
                assert (out.view(bits).reshape(times, *x.shape) == wanted.view(bits)).all(), shift
                assert (np.concatenate([before, after]) == 7).all(), shift


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_gradients_do_not_depend_on_where_dx_goes(dtype):
    """Which decides whether rows are written together or one by one. Some of them float will not do for."""
    width = 1100
    rows = _STREAMED // (width * np.dtype(dtype).itemsize) + 5
    rng = np.random.default_rng(12)
    x, dy = rng.standard_normal((2, rows, width), "float32").astype(dtype)
    x[::13] *= 2.0**70
    w = rng.uniform(0.5, 2, width)
    with threads(2):
        cache = an.layer_norm_forward(x, width, w, w)[1]
        wanted = an.layer_norm_backward(dy, cache)
        for wider in (width, width + 1, (width + 31) // 16 * 16):
            out = np.empty((rows, wider), dtype)[:, :width]
            found = an.layer_norm_backward(dy, cache, out=out)
            for name in ("dx", "dweight", "dbias"):
                np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), f"{name}, {wider}")


_AT_THE_END_OF_A_PAGE = """
import ctypes, mmap
import numpy as np
import arraynorm as an

page = mmap.PAGESIZE
memory = mmap.mmap(-1, (size // page + 2) * page)
end = (size // page + 1) * page
libc = ctypes.CDLL(None, use_errno=True)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert libc.mprotect(ctypes.c_void_p(address + end), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
for short in (0, 2, 6, 10, 14):
    out = np.frombuffer(memory, np.float16, (size - short) // 2, offset=end - size).reshape(1, 1, -1)
    x = np.full_like(out, 2)
    an.batch_norm_frozen(x, np.ones(1), np.ones(1), eps=0.0, out=out)
    assert (out == 1).all(), short
    an.layer_norm_backward(x[0], an.layer_norm_forward(x[0], x.shape[2])[1], out=out[0])
    assert (out == 0).all(), short
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="memory is protected by mprotect")
@each_level
def test_what_bypasses_the_cache_touches_no_page_beyond(level):
    """Instructions that store some bytes of sixteen may fault for all of them."""
    succeed(f"size = {_STREAMED // 2 + 4096}" + _AT_THE_END_OF_A_PAGE, ARRAYNORM_ISA=level)


# -- one norm, several kernels ---------------------------------------------------------------------------------

SYNCHRONIZED = [name for name in EXAMPLES if name.startswith(("batch_norm,", "batch_norm_add_relu,"))]


@pytest.mark.parametrize("route", SYNCHRONIZED)
@each_dtype
@each_level
def test_synchronized_over_one_rank_it_gives_the_bits_of_the_local_norm(route, dtype, level):
    """There the statistics, what is merged, and the rest are kernels of their own, forward and backward."""
    example, arrays = EXAMPLES[route], _draw(EXAMPLES[route], dtype)
    with instructions(level), threads(2):
        _assert_same_bits(_run(example, arrays, comm=SELF), _run(example, arrays))


@pytest.mark.parametrize("volume", [shape for shape in VOLUMES.values() if len(shape) < 4], ids=str)
@each_level
@only("specialised")
def test_a_fused_kernel_is_the_sum_of_its_parts(volume, level):
    arrays = _draw(Example("batch_norm_add_relu", volume), "float32")
    x, addend, dy = (arrays[name].reshape(*volume[:2], -1) for name in ("x", "addend", "dy"))
    weight, bias, n = arrays["weight"], arrays["bias"], x.shape[0] * x.shape[2]
    with instructions(level), threads(3):
        mean, m2 = bn.batch_norm_stats(x)
        rstd = reciprocal_std(m2 / n, 1e-5)
        statistics = {"mean": mean, "var": m2 / n, "rstd": rstd}
        y, *found = bn.batch_norm_forward(x, weight, bias, 1e-5, None)
        _assert_same_bits(dict(zip(statistics, found, strict=True)), statistics)
        _assert_same_bits({"y": y}, {"y": bn.batch_norm_apply(x, mean, rstd, weight, bias, None)})
        y, mask, *found = fused.batch_norm_add_relu_forward(x, addend, weight, bias, 1e-5, None)
        _assert_same_bits(dict(zip(statistics, found, strict=True)), statistics)
        parts = fused.batch_norm_add_relu_apply(x, addend, mean, rstd, weight, bias, None)
        _assert_same_bits({"y": y, "mask": mask}, dict(zip(("y", "mask"), parts, strict=True)))

        sums = bn.batch_norm_backward_reduce(dy, x, mean, rstd)
        dx = bn.batch_norm_backward_apply(dy, x, mean, rstd, weight, *(s / n for s in sums), None)
        wanted = {"dx": dx, "dweight": sums[1], "dbias": sums[0]}
        _assert_same_bits(
            dict(zip(wanted, bn.batch_norm_backward(dy, x, mean, rstd, weight, None), strict=True)), wanted
        )
        sums = fused.batch_norm_add_relu_backward_reduce(dy, mask, x, mean, rstd)
        means = [s / n for s in sums]
        dx, daddend = fused.batch_norm_add_relu_backward_apply(
            dy, mask, x, mean, rstd, weight, *means, True, None, None
        )
        wanted = {"dx": dx, "daddend": daddend, "dweight": sums[1], "dbias": sums[0]}
        whole = fused.batch_norm_add_relu_backward(dy, mask, x, mean, rstd, weight, True, None, None)
        _assert_same_bits(dict(zip(wanted, whole, strict=True)), wanted)


def test_a_sum_in_another_order_would_show():
    """Or these tests could not fail."""
    x = _draw(EXAMPLES["batch_norm, one channel"], "float32")["x"].astype("float64")
    assert np.add.accumulate(x.reshape(-1))[-1] != np.add.accumulate(x.reshape(-1)[::-1])[-1]
