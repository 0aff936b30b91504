"""Section C of the contract: batch norm in training and eval, forward and backward; and L, the worked vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import (
    BATCH_NORMS,
    SYNC_BATCH_NORMS,
    Case,
    affine,
    assert_close,
    draw,
    filled,
    held,
    normalized,
    per_channel,
    values,
)
from namespaces import Namespace, to_numpy
from worked_vector import DECIMALS_4, DECIMALS_7, L_Y, worked_vector

PLAIN = BATCH_NORMS + SYNC_BATCH_NORMS


def other_axes(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i != axis % ndim)


def frozen(layer: Any, x: Any, axis: int = 1) -> np.ndarray[Any, Any]:
    """x normalized with the layer's buffers, in float64."""
    mean, var = (per_channel(a, x.ndim, axis) for a in (layer.running_mean, layer.running_var))
    return (np.asarray(to_numpy(x), np.float64) - mean) / np.sqrt(var + layer.eps)


# -- 17: training, and the worked vector -----------------------------------------------------------------------


@pytest.mark.behaviour(17)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_training_normalizes_with_the_batch_mean_and_the_biased_variance(case: Case, dtype: str, xp: Namespace) -> None:
    layer, x = case.layer(xp=xp.module, dtype=xp.dtype(dtype)), case.x(dtype=dtype, xp=xp)
    assert_close(layer(x), affine(layer, normalized(x, other_axes(x.ndim, 1))))


@pytest.mark.behaviour(17)
@pytest.mark.parametrize("axis", [0, 2, -1])
def test_training_normalizes_over_all_axes_but_the_channels(axis: int) -> None:
    x = draw(4, 5, 6)
    layer = filled(an.BatchNorm(x.shape[axis], axis=axis))
    assert_close(layer(x), affine(layer, normalized(x, other_axes(3, axis)), axis))


@pytest.mark.behaviour(17)
@pytest.mark.parametrize("momentum", [0.1, 0.75])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_training_moves_the_buffers_towards_the_mean_and_the_unbiased_variance(
    case: Case, momentum: float, xp: Namespace
) -> None:
    layer, x = case.layer(momentum=momentum, xp=xp.module), case.x(xp=xp)
    mean, var = values(layer, "running_mean", "running_var")
    axes, wide = other_axes(x.ndim, 1), np.asarray(to_numpy(x), np.float64)
    layer(x)
    assert_close(layer.running_mean, (1 - momentum) * mean + momentum * wide.mean(axes))
    assert_close(layer.running_var, (1 - momentum) * var + momentum * wide.var(axes, ddof=1))


def worked_layer() -> Any:
    layer = filled(an.BatchNorm2d(2, eps=1e-5, momentum=0.1))
    for name, value in {"weight": 1, "bias": 0, "running_mean": 2, "running_var": 1}.items():
        getattr(layer, name)[...] = value
    return layer


@pytest.mark.behaviour(17)
def test_the_worked_vector() -> None:
    layer = worked_layer()
    np.testing.assert_allclose(layer(worked_vector()).ravel(), L_Y, rtol=0, atol=DECIMALS_7)
    np.testing.assert_allclose(layer.running_mean, [1.8233, 1.8065], rtol=0, atol=DECIMALS_4)
    np.testing.assert_allclose(layer.running_var, [0.9007, 1.1187], rtol=0, atol=DECIMALS_4)


@pytest.mark.behaviour(19)
def test_the_worked_vector_is_one_batch() -> None:
    layer = worked_layer()
    layer.num_batches_tracked[...] = 0
    layer(worked_vector())
    assert layer.num_batches_tracked == 1


# -- 20: eval --------------------------------------------------------------------------------------------------


@pytest.mark.behaviour(20)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_eval_uses_the_buffers_and_changes_nothing(case: Case, xp: Namespace) -> None:
    layer, x = case.layer(xp=xp.module).eval(), case.x(xp=xp)
    before = held(layer)
    assert_close(layer(x), affine(layer, frozen(layer, x)))
    assert held(layer) == before


@pytest.mark.behaviour(20)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_eval_without_buffers_uses_the_batch_and_its_biased_variance(case: Case) -> None:
    built, taken, x = case.layer(track_running_stats=False).eval(), case.layer().eval(), case.x()
    taken.running_mean = taken.running_var = None
    for layer in (built, taken):
        before = held(layer)
        assert_close(layer(x), affine(layer, normalized(x, other_axes(x.ndim, 1))))
        assert held(layer) == before


# -- 25: backward ----------------------------------------------------------------------------------------------


@pytest.mark.behaviour(25)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_backward_in_training_goes_through_the_batch_statistics(case: Case, xp: Namespace) -> None:
    layer, x, dy = case.layer(xp=xp.module), case.x(xp=xp), case.x(1, xp=xp)
    axes = other_axes(x.ndim, 1)
    layer(x)
    dx = layer.backward(dy)
    x_hat, wide = normalized(x, axes), np.asarray(to_numpy(dy), np.float64)
    std = np.sqrt(np.asarray(to_numpy(x), np.float64).var(axes, keepdims=True) + layer.eps)
    mean_dy, mean_dy_x_hat = wide.mean(axes, keepdims=True), (wide * x_hat).mean(axes, keepdims=True)
    assert_close(dx, per_channel(layer.weight, x.ndim) / std * (wide - mean_dy - x_hat * mean_dy_x_hat))
    assert_close(layer.grads["weight"], (wide * x_hat).sum(axes))
    assert_close(layer.grads["bias"], wide.sum(axes))


@pytest.mark.behaviour(25)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_backward_in_eval_goes_past_the_frozen_statistics(case: Case, xp: Namespace) -> None:
    layer, x, dy = case.layer(xp=xp.module).eval(), case.x(xp=xp), case.x(1, xp=xp)
    axes, wide = other_axes(x.ndim, 1), np.asarray(to_numpy(dy), np.float64)
    layer(x)
    dx = layer.backward(dy)
    std = np.sqrt(per_channel(layer.running_var, x.ndim) + layer.eps)
    assert_close(dx, wide * per_channel(layer.weight, x.ndim) / std)
    assert_close(layer.grads["weight"], (wide * frozen(layer, x)).sum(axes))
    assert_close(layer.grads["bias"], wide.sum(axes))


@pytest.mark.behaviour(25)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_backward_in_eval_without_buffers_is_that_of_training(case: Case) -> None:
    layer, training = case.layer(track_running_stats=False).eval(), case.layer()
    for each in (layer, training):
        each(case.x())
    np.testing.assert_array_equal(layer.backward(case.x(1)), training.backward(case.x(1)))
    np.testing.assert_array_equal(layer.grads["weight"], training.grads["weight"])
