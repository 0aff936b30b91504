"""Quantized batch norm, with and without ReLU: all 256 levels, against the oracle's values before rounding."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
import oracle
from namespaces import to_numpy
from norms import to_library

OPS = {"quantized_batch_norm": False, "quantized_batch_norm_relu": True}
each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", ["uint8", "int8"])

# How near to a tie float64 may take the other side, in levels: a few eps of the largest term of v / y_scale that can
# end within 8 bits, |mean * weight| / sqrt(var) / y_scale < 3 * 3 / 0.1 / 0.011.
TIE = 8 * 1e4 * 2.0**-52


def _levels(dtype, channels: int) -> np.ndarray:
    """(2, channels, 128): every level in every channel."""
    limits = np.iinfo(dtype)
    levels = np.arange(limits.min, limits.max + 1, dtype=dtype).reshape(2, 1, 128)
    return np.ascontiguousarray(np.broadcast_to(levels, (2, channels, 128)))


def _parameters(channels: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "mean": rng.standard_normal(channels),
        "var": rng.uniform(0.01, 4, channels),
        "weight": rng.standard_normal(channels),
        "bias": rng.standard_normal(channels),
    }


def _zero_points(dtype) -> dict[str, int]:
    return {"x_zero_point": 120, "y_zero_point": 131} if dtype == "uint8" else {"x_zero_point": -8, "y_zero_point": 3}


def _check(op, xq, parameters, **options):
    """Every result is the level next to the exact value, clamped: at most half a level away."""
    yq = to_numpy(getattr(an, op)(xq, **parameters, **options))
    host = {name: None if a is None else to_numpy(a) for name, a in parameters.items()}
    wanted = oracle.quantized_levels(to_numpy(xq), **host, relu=OPS[op], **options)
    limits = np.iinfo(yq.dtype)
    assert (yq.dtype, yq.shape) == (to_numpy(xq).dtype, xq.shape)
    clamped = np.clip(oracle.narrow(wanted), limits.min, limits.max)
    assert np.abs(yq - clamped).max() <= 0.5 + TIE
    return yq


@each_op
@each_dtype
@pytest.mark.parametrize("parameter_dtype", ["float32", "float64"])
@pytest.mark.parametrize("scales", [(0.05, 0.04), (0.001, 0.3), (1.0, 0.011)])
def test_every_level_is_rounded_to_the_nearest(xp, op, dtype, parameter_dtype, scales):
    options = {"x_scale": scales[0], "y_scale": scales[1], **_zero_points(dtype)}
    yq = _check(op, xp.asarray(_levels(dtype, 33)), to_library(xp, _parameters(33), parameter_dtype), **options)
    assert len(np.unique(yq)) > 2


@each_op
@each_dtype
@pytest.mark.parametrize("axis", [0, 2, -1, -3])
def test_any_channel_axis(xp, op, dtype, axis):
    xq = np.moveaxis(_levels(dtype, 3), 1, axis)
    options = {"x_scale": 0.05, "y_scale": 0.04, "axis": axis, "eps": 0.5, **_zero_points(dtype)}
    _check(op, xp.asarray(xq), to_library(xp, _parameters(3), "float32"), **options)


@each_op
@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")])
def test_absent_weight_and_bias_are_one_and_zero(xp, op, absent):
    parameters = to_library(xp, _parameters(3) | dict.fromkeys(absent), "float32")
    _check(op, xp.asarray(_levels("int8", 3)), parameters, x_scale=0.05, y_scale=0.04, **_zero_points("int8"))


@pytest.mark.parametrize("y_zero_point", [0, 1])
def test_ties_go_to_the_even_multiple_of_the_scale(xp, y_zero_point):
    """Mean 0, variance 1, eps 0: v = xq / 2 exactly. The tie is broken before the zero point is added."""
    xq = xp.asarray(np.arange(-5, 6, dtype=np.int8).reshape(1, 1, 11))
    unit = {"mean": xp.asarray([0.0], "float64"), "var": xp.asarray([1.0], "float64")}
    options = {"x_scale": 0.5, "x_zero_point": 0, "y_scale": 1.0, "y_zero_point": y_zero_point, "eps": 0.0}
    even = np.array([-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2])
    np.testing.assert_array_equal(to_numpy(an.quantized_batch_norm(xq, **unit, **options))[0, 0], even + y_zero_point)
    relu = to_numpy(an.quantized_batch_norm_relu(xq, **unit, **options))[0, 0]
    np.testing.assert_array_equal(relu, np.maximum(even, 0) + y_zero_point)


@each_dtype
def test_values_beyond_the_8_bits_are_clamped(xp, dtype):
    limits = np.iinfo(dtype)
    huge = {"mean": np.array([0.0]), "var": np.array([1.0]), "weight": np.array([1e30])}
    options = {"x_scale": 1.0, "y_scale": 1e-3, **dict.fromkeys(("x_zero_point", "y_zero_point"), 5)}
    xq = xp.asarray(np.array([[[3, 5, 7]]], dtype=dtype))
    parameters = to_library(xp, huge, "float64")
    np.testing.assert_array_equal(
        to_numpy(an.quantized_batch_norm(xq, **parameters, **options))[0, 0], [limits.min, 5, limits.max]
    )
    np.testing.assert_array_equal(
        to_numpy(an.quantized_batch_norm_relu(xq, **parameters, **options))[0, 0], [5, 5, limits.max]
    )


@each_op
def test_zero_variance_and_zero_eps_give_the_bias(xp, op):
    parameters = to_library(xp, _parameters(3) | {"var": np.zeros(3)}, "float32")
    options = {"x_scale": 0.05, "y_scale": 0.04, "eps": 0.0, **_zero_points("uint8")}
    yq = _check(op, xp.asarray(_levels("uint8", 3)), parameters, **options)
    assert (yq == yq[:1, :, :1]).all()


@each_op
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_an_empty_input_gives_an_empty_output(xp, op, shape):
    xq = xp.asarray(np.empty(shape, dtype=np.int8))
    parameters = to_library(xp, _parameters(shape[1]), "float32")
    yq = getattr(an, op)(xq, **parameters, x_scale=1.0, x_zero_point=0, y_scale=1.0, y_zero_point=0)
    assert (yq.shape, yq.dtype) == (shape, xq.dtype)


@each_op
def test_memory_layout_does_not_matter(op):
    xq, options = _levels("int8", 3), {"x_scale": 0.05, "y_scale": 0.04, **_zero_points("int8")}
    wanted = _check(op, xq, _parameters(3), **options)
    for view in (
        np.ascontiguousarray(xq.T).T,
        np.flip(np.ascontiguousarray(np.flip(xq))),
        xq.repeat(2, axis=1)[:, ::2],
    ):
        np.testing.assert_array_equal(_check(op, view, _parameters(3), **options), wanted)
