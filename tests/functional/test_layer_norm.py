"""Layer norm. What every norm promises stands in test_accuracy.py."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from namespaces import to_numpy
from norms import Example, draw, draw_dy, each_dtype, to_library
from tolerances import check

SHAPES = [
    *(Example("layer_norm", (2, 3, 4, 5), {"normalized_shape": shape}) for shape in ((5,), (4, 5), (3, 4, 5))),
    Example("layer_norm", (2, 3, 4, 5), {"normalized_shape": (2, 3, 4, 5), "eps": 0.5}),
    Example("layer_norm", (33,), {"normalized_shape": (33,)}),
    Example("layer_norm", (1023, 2), {"normalized_shape": (2,)}),
    Example("layer_norm", (3, 1), {"normalized_shape": (1,)}),
]


@pytest.mark.parametrize("example", SHAPES, ids=str)
@each_dtype
def test_any_number_of_normalized_dimensions(xp, dtype, example: Example):
    check(example, to_library(xp, draw(example), dtype), xp.asarray(draw_dy(example), dtype))


@pytest.mark.parametrize("shape", [5, (5,), [5], np.int64(5), (np.int64(5),)], ids=repr)
def test_the_normalized_shape_may_be_a_number_or_any_sequence(xp, shape):
    x = xp.asarray(np.random.default_rng(0).standard_normal((3, 5)))
    y, cache = an.layer_norm_forward(x, shape)
    np.testing.assert_array_equal(to_numpy(y), to_numpy(an.layer_norm(x, (5,))))
    assert cache.normalized_shape == (5,)


def test_the_parameters_gradients_have_the_parameters_shape(xp):
    example = Example("layer_norm", (2, 3, 4, 5), {"normalized_shape": (4, 5)})
    given, dy = to_library(xp, draw(example), "float64"), draw_dy(example)
    _, cache = an.layer_norm_forward(**given, **example.options)
    gradients = an.layer_norm_backward(xp.asarray(dy), cache)
    assert gradients.dweight.shape == gradients.dbias.shape == (4, 5)
    np.testing.assert_allclose(to_numpy(gradients.dbias), dy.sum(axis=(0, 1)), atol=2**-49)


def test_rows_of_one_value_give_the_bias(xp):
    x = xp.asarray([[3.0], [-1e30]], "float32")
    y = an.layer_norm(x, 1, xp.asarray([2.0], "float32"), xp.asarray([0.7], "float32"))
    np.testing.assert_array_equal(to_numpy(y), np.float32([[0.7], [0.7]]))
