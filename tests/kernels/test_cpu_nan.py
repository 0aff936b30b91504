"""A NaN stays one, whatever its bits: bfloat16 results are rounded without a look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import only
from compiled import each_level, instructions, needs_native
from data import Host

pytestmark = needs_native
ml_dtypes = pytest.importorskip("ml_dtypes")

RNG = np.random.default_rng(11)
ALL_ONES = {
    name: np.frombuffer(b"\xff" * np.dtype(kind).itemsize, kind)[0]
    for name, kind in (("float16", "f2"), ("bfloat16", ml_dtypes.bfloat16), ("float32", "f4"), ("float64", "f8"))
}
"""The NaN whose bits are all set: one more carried out of its lower half would make it zero."""

SHAPE = (3, 24, 7, 11)
LAYOUTS: dict[str, Callable[[Host], Host]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "two-dimensional": lambda x: np.ascontiguousarray(x[:, :, 0, 0]),
}


def values(shape: tuple[int, ...], dtype: Any) -> Host:
    return RNG.standard_normal(shape).astype(dtype)


def results(x: Host, dy: Host, vectors: Callable[[int], Host]) -> Iterator[tuple[str, Host]]:
    """Every norm's y and dx; vectors(size) are its parameters and given statistics."""
    channels = x.shape[1]
    weight, bias, mean, var = (vectors(channels) for _ in range(4))
    y, cache = an.batch_norm_forward(x, weight, bias)
    yield "batch_norm", y
    yield "batch_norm dx", an.batch_norm_backward(dy, cache).dx
    yield "batch_norm_frozen", an.batch_norm_frozen(x, mean, var, weight, bias)
    y, cache = an.batch_norm_add_relu_forward(x, dy, weight, bias)
    yield "batch_norm_add_relu", y
    yield "batch_norm_add_relu mask", cache.mask
    gradients = an.batch_norm_add_relu_backward(dy, cache)
    yield "batch_norm_add_relu dx", gradients.dx
    yield "batch_norm_add_relu daddend", gradients.daddend
    if x.ndim > 2:
        y, cache = an.instance_norm_forward(x, weight, bias)
        yield "instance_norm", y
        yield "instance_norm dx", an.instance_norm_backward(dy, cache).dx
        y, cache = an.group_norm_forward(x, 4, weight, bias)
        yield "group_norm", y
        yield "group_norm dx", an.group_norm_backward(dy, cache).dx
    last = x.shape[-1]
    y, cache = an.layer_norm_forward(x, last, vectors(last), vectors(last))
    yield "layer_norm", y
    yield "layer_norm dx", an.layer_norm_backward(dy, cache).dx
    y, cache = an.rms_norm_forward(x, last, vectors(last))
    yield "rms_norm", y
    yield "rms_norm dx", an.rms_norm_backward(dy, cache).dx


def assert_nan_where_the_reference_has_it(x: Host, dy: Host, vectors: Callable[[int], Host], level: str) -> None:
    with instructions(level), only("specialised"):
        found = list(results(x, dy, vectors))
    with only("reference"):
        expected = list(results(x, dy, vectors))
    for (name, ours), (_, reference) in zip(found, expected, strict=True):
        if ours.dtype == np.uint8:
            np.testing.assert_array_equal(ours, reference, err_msg=name)
        else:
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(reference), err_msg=name)


@each_level
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("parameters", ALL_ONES)
def test_a_parameter_of_any_dtype(parameters: str, layout: Any, level: str) -> None:
    def vectors(size: int) -> Host:
        vector = np.ones(size, ALL_ONES[parameters].dtype)
        vector[[0, size // 2, -1]] = ALL_ONES[parameters]
        return vector

    x, dy = (layout(values(SHAPE, ml_dtypes.bfloat16)) for _ in range(2))
    assert_nan_where_the_reference_has_it(x, dy, vectors, level)


@each_level
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("bits", [0x7FFF, 0xFFFF, 0x7F81, 0xFF81, 0x7FC0])
def test_an_element(bits: int, layout: Any, level: str) -> None:
    x, dy = (layout(values(SHAPE, ml_dtypes.bfloat16)) for _ in range(2))
    x.view(np.uint16)[1, 3] = bits
    dy.view(np.uint16)[2, 5] = bits
    assert_nan_where_the_reference_has_it(x, dy, lambda size: np.ones(size, np.float32), level)


@each_level
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_mask_of_relu_next_to_the_least_positive_number(dtype: str, layout: Any, level: str) -> None:
    """A result is positive as it is stored: half of the least number of x's dtype rounds to zero."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    least = float(ml_dtypes.finfo(kind).smallest_subnormal)
    x = layout(values(SHAPE, kind))
    x[...] = 1
    x[0] = 3
    factors = np.resize([0.5, 0.75, 1.0, -0.5, -1.0, 0.0, np.nan, 0.25], x.shape[1]) * least
    zero, one = np.zeros_like(factors), np.ones_like(factors)
    with instructions(level), only("specialised"):
        y, cache = an.batch_norm_add_relu_frozen_forward(x, np.zeros_like(x), zero, one, factors, zero, eps=0.0)
    with only("reference"):
        expected, reference = an.batch_norm_add_relu_frozen_forward(
            x, np.zeros_like(x), zero, one, factors, zero, eps=0.0
        )
    np.testing.assert_array_equal(y.astype(float), expected.astype(float))
    np.testing.assert_array_equal(cache.mask, reference.mask)
