"""RMS norm. What every norm promises stands in test_accuracy.py."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from namespaces import NUMPY, to_numpy
from norms import Example, draw, draw_dy, each_dtype, to_library
from tolerances import check

SHAPES = [
    *(Example("rms_norm", (2, 3, 4, 5), {"normalized_shape": shape}) for shape in ((5,), (4, 5), (2, 3, 4, 5))),
    Example("rms_norm", (2, 3, 4), {"normalized_shape": (4,), "eps": 0.5}),
    Example("rms_norm", (33,), {"normalized_shape": (33,), "eps": 0.0}),
    Example("rms_norm", (1023, 2), {"normalized_shape": (2,)}),
    Example("rms_norm", (3, 1), {"normalized_shape": (1,)}),
]


@pytest.mark.parametrize("example", SHAPES, ids=str)
@each_dtype
def test_any_number_of_normalized_dimensions(xp, dtype, example: Example):
    check(example, to_library(xp, draw(example), dtype), xp.asarray(draw_dy(example), dtype))


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "eps"),
    [
        ("float16", "float16", 2.0**-23),
        ("bfloat16", "bfloat16", 2.0**-23),
        ("float32", "float32", 2.0**-23),
        ("float32", "float64", 2.0**-52),
        ("float64", "float32", 2.0**-52),
    ],
)
def test_the_default_eps_is_that_of_the_computation_dtype(dtype, weight_dtype, eps):
    """x is small enough for eps to count: its mean square is 2^-26."""
    x = NUMPY.asarray(np.full((1, 4), 2.0**-13), dtype)
    weight = NUMPY.asarray(np.ones(4), weight_dtype)
    _, cache = an.rms_norm_forward(x, 4, weight)
    np.testing.assert_allclose(cache.rstd, [1 / np.sqrt(2.0**-26 + eps)], rtol=2**-52)


def test_no_mean_is_subtracted(xp):
    x = xp.asarray([[3.0, 3.0, 3.0]], "float64")
    np.testing.assert_allclose(to_numpy(an.rms_norm(x, 3, eps=0.0)), [[1, 1, 1]], rtol=2**-52)


def test_the_gradient_is_orthogonal_to_x_without_eps(xp):
    """y does not change where x is scaled."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 3, 33))
    _, cache = an.rms_norm_forward(xp.asarray(x), 33, eps=0.0)
    dx = to_numpy(an.rms_norm_backward(xp.asarray(dy), cache).dx)
    np.testing.assert_allclose((x * dx).sum(axis=1), 0, atol=33 * 2**-52 * np.abs(x * dx).max())
