"""Batch norm + add + ReLU. What every norm promises stands in test_accuracy.py."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from namespaces import NUMPY, to_numpy
from norms import Example, backward, draw, draw_dy, each_dtype, forward, to_library
from tolerances import check

OPS = ("batch_norm_add_relu", "batch_norm_add_relu_frozen")
SHAPES = [
    *(Example(op, shape) for op in OPS for shape in ((31, 3), (1, 2, 33), (4, 3, 7, 5))),
    *(Example(op, (5, 3, 7), {"axis": axis, "eps": 0.5}) for op in OPS for axis in (0, 2, -1, -2)),
]


@pytest.mark.parametrize("example", SHAPES, ids=str)
@each_dtype
def test_any_number_of_dimensions_and_any_channel_axis(xp, dtype, example: Example):
    check(example, to_library(xp, draw(example), dtype), xp.asarray(draw_dy(example), dtype))


@pytest.mark.parametrize("op", OPS)
def test_it_is_relu_of_batch_norm_plus_the_addend(xp, op):
    """In float64, where nothing is rounded in between, to the bit."""
    arrays = draw(Example(op, (4, 3, 7)))
    addend = arrays.pop("addend")
    given = to_library(xp, arrays, "float64")
    normalized = to_numpy(getattr(an, op.replace("_add_relu", ""))(**given))
    y = getattr(an, op)(addend=xp.asarray(addend), **given)
    np.testing.assert_array_equal(to_numpy(y), np.maximum(normalized + addend, 0))


@pytest.mark.parametrize("op", OPS)
def test_dy_passes_where_y_is_positive_and_only_there(xp, op):
    example = Example(op, (4, 3, 7))
    dy = draw_dy(example)
    y, cache = forward(example, to_library(xp, draw(example), "float32"))
    gradients = backward(example, xp.asarray(dy), cache)
    passed = np.where(to_numpy(y) > 0, dy, 0)
    assert 0 < np.count_nonzero(passed) < passed.size
    np.testing.assert_array_equal(to_numpy(gradients.daddend), passed.astype(np.float32))
    np.testing.assert_allclose(to_numpy(gradients.dbias), passed.sum(axis=(0, 2)), rtol=2**-23)


@pytest.mark.parametrize("op", OPS)
def test_the_gradient_at_the_kink_is_zero(xp, op):
    """x = 0 under mean 0, no bias, no addend: y is exactly 0."""
    x = np.zeros((2, 3, 4))
    statistics = {"mean": np.zeros(3), "var": np.ones(3)} if op.endswith("frozen") else {}
    example = Example(op, x.shape)
    given = to_library(xp, {"x": x, "addend": x, **statistics}, "float32")
    y, cache = forward(example, given)
    gradients = backward(example, xp.asarray(np.ones_like(x), "float32"), cache)
    for array in (y, cache.mask, gradients.dx, gradients.daddend):
        assert not to_numpy(array).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_sum_that_rounds_to_zero_is_at_the_kink(dtype):
    """v > 0 in float64, but below the dtype's subnormals: y is 0, and so is the gradient."""
    example = Example("batch_norm_add_relu_frozen", (1, 1, 2))
    x = NUMPY.asarray([[[0.0, 1.0]]], dtype)
    given = {"x": x, "addend": None, "mean": np.array([-1e-50]), "var": np.array([1.0])}
    y, cache = forward(example, given)
    np.testing.assert_array_equal(y > 0, [[[False, True]]])
    np.testing.assert_array_equal(backward(example, np.ones((1, 1, 2)), cache).dx > 0, [[[False, True]]])


@pytest.mark.parametrize("op", OPS)
def test_without_an_addend_there_is_no_gradient_for_it(xp, op):
    example = Example(op, (4, 3, 7))
    given = to_library(xp, draw(example) | {"addend": None}, "float32")
    gradients = backward(example, xp.asarray(draw_dy(example), "float32"), forward(example, given)[1])
    assert gradients.daddend is None
    assert gradients._fields == ("dx", "daddend", "dweight", "dbias")


def test_nan_is_not_made_a_zero_by_relu(xp):
    x = np.ones((2, 3, 4))
    x[0, 1, 2] = np.nan
    y = to_numpy(an.batch_norm_add_relu(xp.asarray(x, "float32")))
    np.testing.assert_array_equal(np.isnan(y).all(axis=(0, 2)), [False, True, False])
