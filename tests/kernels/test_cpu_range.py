"""The C++ kernels compute in float32 what float32 holds; what it doesn't, squares and products of small and large
numbers, is found, and computed in float64, without a trace on the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import only
from compiled import needs_native, threads
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
each_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])


def kind(dtype: str) -> Any:
    return pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


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


@pytest.mark.parametrize("rows", [[3], [0, 7], [5, 6, 7, 8], [15, 17]], ids=str)
@pytest.mark.parametrize("factor", [1e25, 1e-30, 0])
@pytest.mark.parametrize("width", [64, 512, 4096])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_gradients_of_rows_beyond_the_range_are_added_up_once_with_those_of_the_others(
    norm: str, width: int, factor: float, rows: list[int]
):
    """Also where dx takes the place of dy: rows may be looked at again when the first have been written."""
    x, dy = (RNG.standard_normal((20, width)).astype(np.float32) for _ in range(2))
    dy[rows] *= np.float32(factor)
    weight, bias = np.ones(width, np.float32), np.zeros(width, np.float32)
    _, cache = NORMS[norm](x, weight=weight, **({"bias": bias} if norm == "layer_norm" else {}))
    backward = getattr(an, f"{norm}_backward")
    with only("reference"):
        expected = backward(dy, cache)
    found = backward(dy, cache)
    for name, value in expected._asdict().items():
        error, size = (np.abs(v, dtype=np.float64) for v in (getattr(found, name) - value, value))
        assert (error <= C * EPS32 * np.max(size, axis=-1, keepdims=True)).all(), name
    in_place = backward(dy, cache, out=dy)
    assert [v.tobytes() for v in in_place] == [v.tobytes() for v in found]


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(4, 0), (20, 0), (0, 4)], ids=str)
@each_dtype
def test_rows_without_elements_have_the_statistics_of_the_reference(dtype: str, shape: tuple[int, int], norm: str):
    x = np.zeros(shape, kind(dtype))
    _, cache = NORMS[norm](x)
    with only("reference"):
        _, expected = NORMS[norm](x)
    np.testing.assert_array_equal(cache.rstd, expected.rstd)
    if norm == "layer_norm":
        np.testing.assert_array_equal(cache.mean, expected.mean)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(37, 16), (37, 100), (21, 300), (9, 2056)], ids=str)
@each_dtype
def test_a_row_has_the_bits_that_it_has_alone(dtype: str, shape: tuple[int, int], norm: str):
    """Short ones are reduced some at a time: with large and small ones, equal elements, infinity and NaN."""
    x = RNG.standard_normal(shape)
    x[1::7] *= 1e4 if dtype == "float16" else 1e25
    x[2::7] = 3
    x[3::7, -1] = np.inf
    x[4::7, 0] = np.nan
    x[5::7] *= 1e-30
    x = x.astype(kind(dtype))
    y, cache = NORMS[norm](x)
    for row in range(len(x)):
        y_alone, alone = NORMS[norm](x[row : row + 1])
        assert y_alone.tobytes() == y[row].tobytes()
        assert np.array_equal(alone.rstd.ravel(), cache.rstd.ravel()[row : row + 1], equal_nan=True)
        if norm == "layer_norm":
            assert np.array_equal(alone.mean.ravel(), cache.mean.ravel()[row : row + 1], equal_nan=True)
    assert not y[2::7].any() or norm == "rms_norm"
    finite = np.isfinite(x.astype(np.float64)).all(axis=1)
    assert np.isfinite(y.astype(np.float64)[finite]).all()


@pytest.mark.parametrize("shape", [(7, 4), (16, 4), (63, 9), (100, 4), (16, 4, 3), (2, 4, 64), (64, 4, 9)])
@pytest.mark.parametrize(("value", "dtype"), [(1e38, "float32"), (1e308, "float64"), (1.23e200, "float64")])
def test_equal_elements_have_no_deviation_however_large_their_sum(shape: tuple[int, ...], value: float, dtype: str):
    x = np.full(shape, value, dtype)
    assert not an.batch_norm(x).any()
    assert not an.layer_norm(x, shape[-1]).any()
    if len(shape) > 2:
        assert not an.group_norm(x, 2).any()


def test_a_channel_whose_first_rows_are_huge_is_summed_all_the_same():
    x = RNG.standard_normal((16, 4)).astype(np.float32)
    x[:8, 1] = 1e38
    with only("reference"):
        expected = an.batch_norm(x)
    np.testing.assert_allclose(an.batch_norm(x), expected, rtol=0, atol=C * EPS32)


@pytest.mark.parametrize("shape", [(65, 512, 64), (513, 2, 1027)])
def test_channels_that_are_summed_sample_by_sample_are_looked_at_again(shape: tuple[int, ...]):
    """Squares out of range, a pivot far from the rest, equal elements, and a NaN: each in a channel of its own."""
    x, dy = (RNG.standard_normal(shape).astype(np.float32) for _ in range(2))
    x[:, 0] *= np.float32(1e25)
    x[0, 1] = 1e30
    with only("reference"):
        y, cache = an.batch_norm_forward(x, eps=0.0)
        wanted = [y, an.batch_norm_backward(dy, cache).dx]
    y, cache = an.batch_norm_forward(x, eps=0.0)
    found = [y, an.batch_norm_backward(dy, cache).dx]
    for array, expected in zip(found, wanted, strict=True):
        largest = np.max(np.abs(expected), axis=(0, 2), keepdims=True)
        assert np.max(np.abs(array - expected) / largest) <= C * EPS32

    x[:, 0], x[-1, 1, -1] = 1e37, np.nan
    other = an.batch_norm(x, eps=0.0)
    assert not other[:, 0].any()
    assert np.isnan(other[:, 1]).all()
    assert other[:, 2:].tobytes() == y[:, 2:].tobytes()


def test_few_values_to_a_channel_are_summed_in_float64_wherever_they_lie():
    """Every second channel, 64 KiB apart: of fewer than 64 values float32's rounding errors would show."""
    x, dy = (RNG.standard_normal((16, 16384, 2)).astype(np.float32)[:, ::2] for _ in range(2))
    dx = an.batch_norm_backward(dy, an.batch_norm_forward(x)[1]).dx
    with only("reference"):
        expected = an.batch_norm_backward(dy, an.batch_norm_forward(x)[1]).dx
    np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize("shape", [(300, 40), (5000, 3), (40, 5000), (3000, 200)])
def test_a_second_look_at_some_channels_changes_no_bit_of_others_nor_depends_on_them(shape: tuple[int, int]):
    x, dy = (RNG.standard_normal(shape).astype(np.float32) for _ in range(2))
    odd, all_odd = x.copy(), np.full_like(x, 1e25)
    odd[:, 1] = all_odd[:, 1] = (1e25 * x[:, 1]).astype(np.float32)  # out of float32's range when squared
    odd[:, 0] = all_odd[:, 0] = 0
    y, cache = an.batch_norm_forward(x)
    other, other_cache = an.batch_norm_forward(odd)
    third, third_cache = an.batch_norm_forward(all_odd)
    assert y[:, 2:].tobytes() == other[:, 2:].tobytes()
    assert other[:, :2].tobytes() == third[:, :2].tobytes()
    dx = an.batch_norm_backward(dy, cache).dx
    other_dx, third_dx = an.batch_norm_backward(dy, other_cache).dx, an.batch_norm_backward(dy, third_cache).dx
    assert dx[:, 2:].tobytes() == other_dx[:, 2:].tobytes()
    assert other_dx[:, :2].tobytes() == third_dx[:, :2].tobytes()


def test_bits_of_the_mask_where_rows_overlap():
    """Rows so near that those of a tile of some channels would look adjacent."""
    n, c, distance = 256, 5000, 8
    x, dy = (
        np.lib.stride_tricks.as_strided(
            RNG.standard_normal(n * distance + c).astype(np.float32), (n, c), (4 * distance, 4)
        )
        for _ in range(2)
    )

    def dx(x: Host, dy: Host) -> Host:
        return an.batch_norm_add_relu_backward(dy, an.batch_norm_add_relu_forward(x)[1]).dx

    np.testing.assert_allclose(dx(x, dy), dx(x.copy(), dy.copy()), rtol=0, atol=1e-4)


@each_dtype
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_nan_among_the_gradients_of_parameters_has_one_sign_at_any_number_of_threads(norm: str, dtype: str):
    """Two meet in a sum: of an infinite row, and of one with a NaN in another block of samples."""
    x, dy = (RNG.standard_normal((5003, 17)).astype(kind(dtype)) for _ in range(2))
    x[3, 5], x[2501, 5] = np.inf, np.nan
    weight = np.ones(17)
    found = set()
    for number in (1, 2, 3, 8):
        with threads(number):
            if norm == "layer_norm":
                gradients = an.layer_norm_backward(dy, an.layer_norm_forward(x, 17, weight, weight)[1])
            else:
                gradients = an.rms_norm_backward(dy, an.rms_norm_forward(x, 17, weight)[1])
            found.add((gradients.dx.tobytes(), gradients.dweight.tobytes()))
    assert np.isnan(gradients.dweight).any()
    assert len(found) == 1


def test_infinity_first_in_a_row_that_does_not_fill_a_register():
    x = np.zeros((1, 1, 5), np.float32)
    x[0, 0, 0] = np.inf
    _, cache = an.batch_norm_frozen_forward(x, np.zeros(1), np.ones(1), np.ones(1))
    assert an.batch_norm_frozen_backward(np.ones_like(x), cache).dweight == np.inf
