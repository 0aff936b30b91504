"""Batch norm: with its own statistics, and with given ones. What every norm promises stands in test_accuracy.py."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SELF
from namespaces import to_numpy
from norms import Example, backward, draw, draw_dy, each_dtype, forward, to_library
from tolerances import EPS32, C, check, in_float32
from worked_vector import DECIMALS_4, DECIMALS_7, L_Y, worked_vector

OPS = ("batch_norm", "batch_norm_frozen")
SHAPES = [
    *(Example(op, shape) for op in OPS for shape in ((31, 3), (1, 2, 33), (4, 3, 7, 5), (2, 1, 3, 2, 5))),
    *(Example(op, (5, 3, 7), {"axis": axis}) for op in OPS for axis in (0, 2, -1, -2, -3)),
    *(Example(op, (5, 1, 3, 2), {"axis": axis, "eps": 0.5}) for op in OPS for axis in (0, 1, 3)),
]


@pytest.mark.parametrize("example", SHAPES, ids=str)
@each_dtype
def test_any_number_of_dimensions_and_any_channel_axis(xp, dtype, example: Example):
    check(example, to_library(xp, draw(example), dtype), xp.asarray(draw_dy(example), dtype))


@pytest.mark.parametrize("op", [an.batch_norm, an.instance_norm, lambda x: an.group_norm(x, 2)])
def test_the_worked_vector_is_reproduced(xp, op):
    """One sample of two channels: batch, instance and group norm (of two groups) agree."""
    np.testing.assert_allclose(to_numpy(op(xp.asarray(worked_vector()))).ravel(), L_Y, rtol=0, atol=DECIMALS_7)


def test_the_worked_statistics_are_the_mean_and_the_biased_variance(xp):
    x = xp.asarray(worked_vector())
    _, cache = an.batch_norm_forward(x)
    np.testing.assert_allclose(to_numpy(cache.mean), [0.2326, 0.0653], rtol=0, atol=DECIMALS_4)
    biased = worked_vector().astype(np.float64).var(axis=(0, 2, 3))
    np.testing.assert_allclose(to_numpy(cache.var), biased, rtol=C * EPS32 if in_float32(x) else 2**-50)


def test_40000_to_40003_in_float32_come_out_right_to_the_last_bit(xp):
    """In float32, sums of squares of these know nothing of their variance, 5/4."""
    x = xp.asarray([[40000.0], [40001.0], [40002.0], [40003.0]], "float32")
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25 + 1e-5)
    np.testing.assert_array_equal(to_numpy(an.batch_norm(x))[:, 0], expected.astype(np.float32))


def test_given_statistics_that_are_the_batchs_own_give_the_same_y(xp):
    example = Example("batch_norm", (4, 3, 7))
    given = to_library(xp, draw(example), "float64")
    y, cache = forward(example, given)
    frozen = an.batch_norm_frozen(mean=cache.mean, var=cache.var, **given)
    np.testing.assert_array_equal(to_numpy(frozen), to_numpy(y))


def test_given_statistics_send_dy_straight_through(xp):
    """dx = dy * weight * rstd: the statistics do not depend on x."""
    example = Example("batch_norm_frozen", (4, 3, 7))
    arrays, dy = draw(example), draw_dy(example)
    _, cache = forward(example, to_library(xp, arrays, "float64"))
    dx = to_numpy(backward(example, xp.asarray(dy), cache).dx)
    rstd = 1 / np.sqrt(arrays["var"] + 1e-5)
    np.testing.assert_allclose(dx, dy * (arrays["weight"] * rstd)[:, None], rtol=4 * 2**-52)


def test_given_statistics_take_one_value_per_channel(xp):
    example = Example("batch_norm_frozen", (1, 3))
    check(example, to_library(xp, draw(example), "float32"), xp.asarray(draw_dy(example), "float32"))


@pytest.mark.parametrize("op", ["batch_norm", "batch_norm_add_relu"])
def test_a_communicator_of_one_rank_changes_no_bit(xp, op):
    example = Example(op, (4, 3, 7))
    given, dy = to_library(xp, draw(example), "float32"), xp.asarray(draw_dy(example), "float32")
    results = []
    for comm in (None, SELF):
        y, cache = forward(example, given, comm=comm)
        results.append([to_numpy(a) for a in (y, cache.mean, cache.var, cache.rstd, *backward(example, dy, cache))])
    for alone, synchronized in zip(*results, strict=True):
        np.testing.assert_array_equal(alone, synchronized)
