"""Section H of the contract: instance norm's statistics, buffers and counter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import (
    COUNTED,
    INSTANCE_NORMS,
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
from worked_vector import DECIMALS_7, L_Y, worked_vector

CASES = pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)


def wide(x: Any) -> np.ndarray[Any, Any]:
    return np.asarray(to_numpy(x), np.float64)


@pytest.mark.behaviour(40)
@pytest.mark.parametrize(("training", "tracking"), [(True, True), (True, False), (False, False)])
@CASES
def test_the_input_normalizes_in_training_and_without_tracking(
    case: Case, training: bool, tracking: bool, xp: Namespace
) -> None:
    layer, x = case.layer(track_running_stats=tracking, xp=xp.module).train(training), case.x(xp=xp)
    assert_close(layer(x), affine(layer, normalized(x, tuple(range(2, x.ndim)))))


@CASES
def test_backward_goes_through_the_instances_statistics(case: Case, xp: Namespace) -> None:
    """No number of the contract speaks of this."""
    layer, x, dy = case.layer(xp=xp.module), case.x(xp=xp), case.x(1, xp=xp)
    spatial = tuple(range(2, x.ndim))
    x_hat = normalized(x, spatial)
    layer(x)
    dx, dy = layer.backward(dy), wide(dy)
    std = np.sqrt(wide(x).var(spatial, keepdims=True) + layer.eps)
    mean_dy, mean_dy_x_hat = dy.mean(spatial, keepdims=True), (dy * x_hat).mean(spatial, keepdims=True)
    assert_close(dx, per_channel(layer.weight, x.ndim) / std * (dy - mean_dy - x_hat * mean_dy_x_hat))
    assert_close(layer.grads["weight"], (dy * x_hat).sum((0, *spatial)))
    assert_close(layer.grads["bias"], dy.sum((0, *spatial)))


@pytest.mark.behaviour(40)
@pytest.mark.parametrize("axis", [2, -1])
def test_the_channels_may_stand_elsewhere(axis: int) -> None:
    x = draw(2, 4, 3, 5) if axis == 2 else draw(2, 4, 5, 3)
    layer = filled(an.InstanceNorm2d(3, affine=True, track_running_stats=True, axis=axis))
    moved = filled(an.InstanceNorm2d(3, affine=True, track_running_stats=True))
    assert_close(np.moveaxis(layer(x), axis, 1), moved(np.moveaxis(x, axis, 1)))
    assert_close(layer.running_var, moved.running_var)


@pytest.mark.behaviour(40)
@pytest.mark.parametrize("momentum", [0.1, 0.75])
@CASES
def test_the_buffers_move_towards_the_means_over_the_instances(case: Case, momentum: float, xp: Namespace) -> None:
    layer, x = case.layer(momentum=momentum, xp=xp.module), case.x(xp=xp)
    mean, var = values(layer, "running_mean", "running_var")
    spatial = tuple(range(2, x.ndim))
    layer(x)
    means, unbiased = wide(x).mean(spatial), wide(x).var(spatial, ddof=1)
    assert_close(layer.running_mean, (1 - momentum) * mean + momentum * means.mean(0))
    assert_close(layer.running_var, (1 - momentum) * var + momentum * unbiased.mean(0))


@pytest.mark.behaviour(40)
@CASES
def test_eval_while_tracking_is_batch_norms_eval(case: Case, xp: Namespace) -> None:
    layer = case.layer(xp=xp.module).eval()
    batch_norm = filled(an.BatchNorm(3, xp=xp.module)).eval()
    before = held(layer)
    np.testing.assert_array_equal(to_numpy(layer(case.x(xp=xp))), to_numpy(batch_norm(case.x(xp=xp))))
    assert held(layer) == before
    dx, expected = layer.backward(case.x(1, xp=xp)), batch_norm.backward(case.x(1, xp=xp))
    np.testing.assert_array_equal(to_numpy(dx), to_numpy(expected))
    assert held(layer) == held(batch_norm)


@pytest.mark.behaviour(40)
def test_the_worked_vector_is_one_instance() -> None:
    layer = an.InstanceNorm2d(2, eps=1e-5, affine=False, track_running_stats=False)
    np.testing.assert_allclose(layer(worked_vector()).ravel(), L_Y, rtol=0, atol=DECIMALS_7)


@pytest.mark.behaviour(41)
@pytest.mark.parametrize("unbatched", [False, True])
@CASES
def test_the_counter_counts_here_too(case: Case, unbatched: bool) -> None:
    layer = case.layer()
    for seed in range(3):
        layer(case.x(seed)[0] if unbatched else case.x(seed))
    assert layer.num_batches_tracked == COUNTED + 3
    layer.eval()(case.x())
    assert layer.num_batches_tracked == COUNTED + 3


@pytest.mark.behaviour(41)
@CASES
def test_without_momentum_the_buffers_are_cumulative_means_here_too(case: Case) -> None:
    layer, newest = case.layer(momentum=None, dtype=np.float64), case.layer(momentum=1.0, dtype=np.float64)
    layer.num_batches_tracked[...] = 0
    seen = []
    for seed in range(5):
        for each in (layer, newest):
            each(case.x(seed, "float64"))
        seen.append(values(newest, "running_mean", "running_var"))
        assert_close(layer.running_mean, np.mean([mean for mean, _ in seen], axis=0))
        assert_close(layer.running_var, np.mean([var for _, var in seen], axis=0))
