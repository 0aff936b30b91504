"""Group norm. What every norm promises stands in test_accuracy.py."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from namespaces import to_numpy
from norms import Example, draw, draw_dy, each_dtype, to_library
from tolerances import check

SHAPES = [
    *(Example("group_norm", (3, 6, 5), {"num_groups": groups}) for groups in (1, 2, 3, 6)),
    *(Example("group_norm", (2, 5, 3, 4), {"num_groups": 2, "axis": axis}) for axis in (-1, 3)),
    *(Example("group_norm", (2, 3, 4, 5), {"num_groups": 2, "axis": axis, "eps": 0.5}) for axis in (2, -2)),
    Example("group_norm", (31, 33), {"num_groups": 11}),
    Example("group_norm", (1, 2, 1, 2, 3), {"num_groups": 2}),
]


@pytest.mark.parametrize("example", SHAPES, ids=str)
@each_dtype
def test_any_number_of_groups_and_dimensions_and_any_channel_axis(xp, dtype, example: Example):
    check(example, to_library(xp, draw(example), dtype), xp.asarray(draw_dy(example), dtype))


def test_a_group_is_adjacent_channels_of_one_sample(xp):
    """Sample 0 has channels 0, 0, 1000, 1000 and sample 1 has 5, 7, 5, 7: only 5 and 7 differ within a group."""
    x = xp.asarray([[0.0, 0.0, 1000.0, 1000.0], [5.0, 7.0, 5.0, 7.0]], "float32")
    y = to_numpy(an.group_norm(x, 2, eps=0.0))
    np.testing.assert_array_equal(y, [[0, 0, 0, 0], [-1, 1, -1, 1]])


@pytest.mark.parametrize("n", [1, 2])
def test_one_value_per_group_gives_the_bias(xp, n):
    """For every number of samples; torch 2.13 raises for one."""
    example = Example("group_norm", (n, 3), {"num_groups": 3})
    given = to_library(xp, draw(example), "float32")
    y, cache = an.group_norm_forward(**given, num_groups=3)
    np.testing.assert_array_equal(to_numpy(y), np.broadcast_to(to_numpy(given["bias"]), (n, 3)))
    assert not to_numpy(an.group_norm_backward(xp.asarray(draw_dy(example), "float32"), cache).dx).any()


def test_statistics_are_per_sample_and_group(xp):
    x = np.random.default_rng(0).standard_normal((3, 6, 5))
    _, cache = an.group_norm_forward(xp.asarray(x), 2)
    groups = x.reshape(3, 2, 15)
    np.testing.assert_allclose(to_numpy(cache.mean), groups.mean(axis=2), atol=2**-50)
    np.testing.assert_allclose(to_numpy(cache.rstd), 1 / np.sqrt(groups.var(axis=2) + 1e-5), rtol=2**-50)
