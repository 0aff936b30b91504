"""Instance norm. What every norm promises stands in test_accuracy.py."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from namespaces import to_numpy
from norms import Example, draw, draw_dy, each_dtype, to_library
from tolerances import check

SHAPES = [
    *(Example("instance_norm", shape) for shape in ((3, 2, 31), (1, 1, 2), (2, 3, 7, 5), (2, 1, 3, 2, 5))),
    *(Example("instance_norm", (3, 5, 4), {"axis": axis}) for axis in (2, -1, -2)),
    *(Example("instance_norm", (2, 3, 4, 5), {"axis": axis, "eps": 0.5}) for axis in (2, -1)),
]


@pytest.mark.parametrize("example", SHAPES, ids=str)
@each_dtype
def test_any_number_of_dimensions_and_any_channel_axis(xp, dtype, example: Example):
    check(example, to_library(xp, draw(example), dtype), xp.asarray(draw_dy(example), dtype))


def test_every_sample_is_normalized_as_if_alone(xp):
    example = Example("instance_norm", (3, 2, 31))
    given = to_library(xp, draw(example), "float64")
    whole = to_numpy(an.instance_norm(**given))
    for sample in range(3):
        alone = an.instance_norm(**given | {"x": given["x"][sample : sample + 1, ...]})
        np.testing.assert_array_equal(to_numpy(alone)[0], whole[sample])


def test_statistics_are_per_sample_and_channel_and_biased(xp):
    x = np.random.default_rng(0).standard_normal((3, 2, 31))
    _, cache = an.instance_norm_forward(xp.asarray(x))
    np.testing.assert_allclose(to_numpy(cache.mean), x.mean(axis=2), atol=2**-50)
    np.testing.assert_allclose(to_numpy(cache.var), x.var(axis=2), rtol=2**-50)
    assert cache.n == 31
