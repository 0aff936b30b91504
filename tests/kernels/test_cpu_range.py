"""The C++ kernels compute in float32 what float32 holds; what it doesn't, squares and products of small and large
numbers, is found, and computed in float64, without a trace on the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import only
from compiled import needs_native
from data import Host
from tolerances import EPS32, C

pytestmark = needs_native

RNG = np.random.default_rng(7)
SIGNS = np.tile([1.0, -1.0], (64, 8))
NORMS: dict[str, Any] = {
    "layer_norm": lambda x, **options: an.layer_norm_forward(x, x.shape[1], **options),
    "rms_norm": lambda x, **options: an.rms_norm_forward(x, x.shape[1], **options),
    "batch_norm": lambda x, **options: an.batch_norm_forward(x, **options),
    "instance_norm, channels last": lambda x, **options: an.instance_norm_forward(x.T[None], axis=-1, **options),
}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@pytest.mark.parametrize("size", [1e-24, 1e-30, 1e25])
@pytest.mark.parametrize("values", [SIGNS, SIGNS.T, RNG.standard_normal((64, 16))], ids=["signs", "columns", "normal"])
@each_norm
def test_squares_that_float32_does_not_hold_are_held(norm, values: Host, size: float):
    x = (values * size).astype(np.float32)
    y = norm(x, eps=0.0)[0]
    with only("reference"):
        expected = norm(x, eps=0.0)[0]
    np.testing.assert_allclose(y, expected, rtol=0, atol=C * EPS32 * np.max(np.abs(expected)))


def test_products_that_float32_does_not_hold_are_held():
    x = (RNG.standard_normal((4, 64)) * 1e-10).astype(np.float32)
    y, cache = an.rms_norm_forward(x, 64, eps=0.0)
    dy = y * np.float32(1e-37)
    dx = an.rms_norm_backward(dy, cache).dx  # of a loss that grows along y, which x's length does not change
    assert np.max(np.abs(dx)) <= C * EPS32 * np.max(np.abs(dy)) * np.max(cache.rstd)


@pytest.mark.parametrize("factor", [1e20, 1e-24])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4096, 40), (100, 2056), (7, 33)], ids=str)
def test_a_channel_beyond_the_range_changes_no_bit_of_the_others(shape, dtype, factor: float):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x, dy = (RNG.standard_normal(shape) for _ in range(2))
    other = x.copy()
    other[:, 0] *= factor
    results = []
    for values in (x, other):
        y, cache = an.batch_norm_forward(values.astype(kind), eps=0.0)
        gradients = an.batch_norm_backward(dy.astype(kind), cache)
        instances, cache = an.instance_norm_forward(values.astype(kind)[None], axis=-1, eps=0.0)
        dx = an.instance_norm_backward(dy.astype(kind)[None], cache).dx
        results.append([a[..., 1:].tobytes() for a in (y, gradients.dx, instances, dx)])
    assert results[0] == results[1]


def test_a_weight_that_is_nan_changes_no_bit_of_the_other_columns():
    x = RNG.standard_normal((64, 512)).astype(np.float32)
    weight = np.ones(512, np.float32)
    y = an.layer_norm(x, 512, weight)
    weight[0] = np.nan
    hurt = an.layer_norm(x, 512, weight)
    assert np.isnan(hurt[:, 0]).all()
    assert hurt[:, 1:].tobytes() == y[:, 1:].tobytes()


def test_a_row_beyond_the_range_changes_no_bit_of_the_others():
    x, dy = (RNG.standard_normal((16, 512)).astype(np.float32) for _ in range(2))
    _, cache = an.layer_norm_forward(x, 512)
    dx = an.layer_norm_backward(dy, cache).dx
    dy[3] *= np.float32(1e25)
    other = an.layer_norm_backward(dy, cache).dx
    assert np.delete(other, 3, axis=0).tobytes() == np.delete(dx, 3, axis=0).tobytes()
