"""Section J of the contract: batch norm from 8-bit integers to 8-bit integers."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import (
    BATCH_NORMS,
    BUFFERS,
    FILLED,
    FUSED_BATCH_NORMS,
    INSTANCE_NORMS,
    Case,
    draw,
    filled,
    held,
    values,
)
from namespaces import STRICT, to_numpy

PLAIN = [an.QuantizedBatchNorm2d, an.QuantizedBatchNorm3d]
RELU = [an.QuantizedBNReLU2d, an.QuantizedBNReLU3d]
CLASSES = pytest.mark.parametrize("cls", PLAIN + RELU)
DTYPES = pytest.mark.parametrize("dtype", [np.uint8, np.int8])
SCALES = [(0.05, 0.02, -3, 5), (0.031, 0.25, 11, -7), (1.7, 0.9, 0, 0)]  # x_scale, y_scale, x_zero_point, y_zero_point
C = 3


def every_value(cls: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """All 256 values in each channel."""
    limits = np.iinfo(dtype)
    levels = np.arange(limits.min, limits.max + 1).astype(dtype)
    shape = (2, C, 16, 8) if cls in (an.QuantizedBatchNorm2d, an.QuantizedBNReLU2d) else (2, C, 4, 4, 8)
    split = levels.reshape(2, 1, *shape[2:])
    return np.broadcast_to(split, shape).copy()


def centred(dtype: Any) -> int:
    return 128 if dtype is np.uint8 else 0


def layer_of(cls: Any, scale: float = 0.02, zero_point: int = 0, **options: Any) -> Any:
    layer = filled(cls(C, **options))
    layer.scale[...], layer.zero_point[...] = scale, zero_point
    return layer


# -- 43 --------------------------------------------------------------------------------------------------------


@pytest.mark.behaviour(43)
@CLASSES
def test_the_constructor_takes_three_arguments(cls: Any) -> None:
    parameters = inspect.signature(cls).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [("num_features", inspect.Parameter.empty), ("eps", 1e-5), ("momentum", 0.1)]
    layer = cls(C, 1e-3, 0.2)
    assert (layer.num_features, layer.eps, layer.momentum) == (C, 1e-3, 0.2)


@pytest.mark.behaviour(43)
@CLASSES
def test_it_is_always_affine_and_tracking_with_scale_one_and_zero_point_zero_in_the_state(cls: Any) -> None:
    layer = cls(C)
    assert (layer.affine, layer.track_running_stats) == (True, True)
    state = layer.state_dict()
    assert set(state) == {*FILLED, "scale", "zero_point"}
    assert (float(state["scale"]), int(state["zero_point"])) == (1.0, 0)
    for name in ("scale", "zero_point"):
        state[name] = np.asarray(state[name] + 2)
    layer.load_state_dict(state)
    assert (float(layer.scale), int(layer.zero_point)) == (3.0, 2)


@pytest.mark.behaviour(43)
@CLASSES
def test_it_always_normalizes_with_the_running_statistics(cls: Any) -> None:
    x = every_value(cls, np.uint8)
    layer = layer_of(cls)
    before = held(layer)
    trained, evaluated = layer.train()(x, 0.05, 128), layer.eval()(x, 0.05, 128)
    np.testing.assert_array_equal(trained, evaluated)
    assert held(layer) == before
    layer.running_mean[...] += 1
    assert not np.array_equal(layer.train()(x, 0.05, 128), trained)


# -- 44 --------------------------------------------------------------------------------------------------------


def requantized(layer: Any, x: np.ndarray[Any, Any], sx: float, zx: int, relu: bool) -> np.ndarray[Any, Any]:
    """The contract's formula in float64."""
    weight, bias, mean, var = (
        np.asarray(to_numpy(getattr(layer, name)), np.float64).reshape(-1, *[1] * (x.ndim - 2)) for name in FILLED[:4]
    )
    a = weight / np.sqrt(var + layer.eps)
    b = bias - mean * a
    v = (x.astype(np.float64) - zx) * sx * a + b
    v = np.maximum(v, 0) if relu else v
    limits = np.iinfo(x.dtype)
    return np.clip(np.rint(v / float(layer.scale)) + int(layer.zero_point), limits.min, limits.max).astype(x.dtype)


@pytest.mark.behaviour(44)
@pytest.mark.parametrize("scales", SCALES, ids=str)
@DTYPES
@CLASSES
def test_every_value_follows_the_formula(cls: Any, dtype: Any, scales: tuple[float, float, int, int]) -> None:
    sx, sy, zx, zy = scales
    zx, zy = zx + centred(dtype), zy + centred(dtype)
    layer, x = layer_of(cls, sy, zy), every_value(cls, dtype)
    y = layer(x, sx, zx)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, requantized(layer, x, sx, zx, cls in RELU))
    assert len(np.unique(y)) > 16  # neither one value nor the two ends of the range


@pytest.mark.behaviour(44)
@DTYPES
@CLASSES
def test_ties_go_to_even_and_the_range_clamps(cls: Any, dtype: Any) -> None:
    layer = layer_of(cls, 1.0, centred(dtype), eps=0.0)
    for name, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
        getattr(layer, name)[...] = value
    x, zero = every_value(cls, dtype), centred(dtype)
    floor = 0 if cls in RELU else -128
    halves = layer(x, 0.5, zero).astype(int) - zero  # the value itself is n + 0 or n + 1/2, exactly
    expected = [max(round((level - zero) / 2), floor) for level in x.ravel().astype(int)]  # Python rounds to even
    np.testing.assert_array_equal(halves.ravel(), expected)
    tripled = layer(x, 3.0, zero).astype(int) - zero
    np.testing.assert_array_equal(tripled, np.clip(3 * (x.astype(int) - zero), floor, 127))


@pytest.mark.behaviour(44)
@CLASSES
def test_other_array_libraries_follow_the_formula_too(cls: Any) -> None:
    layer, x = layer_of(cls, xp=STRICT.module), every_value(cls, np.int8)
    y = layer(STRICT.asarray(x), 0.05, 0)
    np.testing.assert_array_equal(to_numpy(y), requantized(layer, x, 0.05, 0, cls in RELU))


# -- 45 --------------------------------------------------------------------------------------------------------


@pytest.mark.behaviour(45)
@CLASSES
def test_a_wrong_rank_is_an_error_that_names_the_layout(cls: Any) -> None:
    text, right = ("(N, C, H, W)", 4) if cls.__name__.endswith("2d") else ("(N, C, D, H, W)", 5)
    for ndim in {2, 3, 4, 5, 6} - {right}:
        with pytest.raises(ValueError, match=f"^Input shape must be `{re.escape(text)}`!$"):
            layer_of(cls)(np.zeros((2, C, 1, 1, 1, 1)[:ndim], np.uint8), 1.0, 0)


@pytest.mark.behaviour(45)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
@CLASSES
def test_what_is_not_8_bits_wide_is_a_type_error(cls: Any, dtype: Any) -> None:
    with pytest.raises(TypeError, match="uint8 or int8"):
        layer_of(cls)(every_value(cls, np.uint8).astype(dtype), 1.0, 0)


@pytest.mark.behaviour(45)
@pytest.mark.parametrize("case", BATCH_NORMS + FUSED_BATCH_NORMS, ids=str)
@CLASSES
def test_from_float_keeps_settings_and_state(cls: Any, case: Case) -> None:
    layer = case.layer(eps=1e-3, momentum=0.3)
    new = cls.from_float(layer, 0.25, 7)
    assert type(new) is cls
    assert (new.num_features, new.eps, new.momentum) == (C, 1e-3, 0.3)
    assert (float(new.scale), int(new.zero_point)) == (0.25, 7)
    np.testing.assert_equal(values(new, *FILLED), values(layer, *FILLED))
    new.running_mean[...] = 99
    assert not np.array_equal(layer.running_mean, new.running_mean)


@pytest.mark.behaviour(45)
@CLASSES
def test_from_float_of_a_layer_without_affine_has_the_weight_and_bias_of_a_new_one(cls: Any) -> None:
    layer = filled(an.BatchNorm2d(C, affine=False))
    new = cls.from_float(layer, 0.25, 7)
    np.testing.assert_equal(values(new, "weight", "bias"), values(cls(C), "weight", "bias"))
    np.testing.assert_equal(values(new, *BUFFERS), values(layer, *BUFFERS))


@pytest.mark.behaviour(45)
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_from_float_takes_batch_norms_alone(case: Case) -> None:
    with pytest.raises(TypeError, match="BatchNorm"):
        an.QuantizedBatchNorm2d.from_float(case.layer(), 0.25, 7)
    with pytest.raises(ValueError, match="running statistics"):
        an.QuantizedBatchNorm2d.from_float(an.BatchNorm2d(C, track_running_stats=False), 0.25, 7)


@pytest.mark.behaviour(45)
@CLASSES
def test_scale_and_zero_point_are_for_the_whole_tensor(cls: Any) -> None:
    layer = an.BatchNorm2d(C)
    with pytest.raises(TypeError, match="scale"):
        cls.from_float(layer, draw(C), 0)
    with pytest.raises(TypeError, match="zero_point"):
        cls.from_float(layer, 0.25, np.zeros(C, np.int64))
    with pytest.raises(TypeError, match="x_scale"):
        layer_of(cls)(every_value(cls, np.uint8), np.ones(C), 0)
