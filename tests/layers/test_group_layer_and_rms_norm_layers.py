"""The layers without buffers, against their formulas in float64. No number of the contract speaks of these."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import GROUP_NORM, LAYER_NORM, RMS_NORM, Case, affine, assert_close, draw, filled, held, normalized
from namespaces import Namespace, to_numpy
from worked_vector import DECIMALS_7, L_Y, worked_vector

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def wide(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(to_numpy(array), np.float64)


def group_hat(x: Any, groups: int, eps: float = 1e-5) -> np.ndarray[Any, Any]:
    n, c, *spatial = x.shape
    grouped = wide(x).reshape(n, groups, c // groups, *spatial)
    return normalized(grouped, tuple(range(2, grouped.ndim)), eps).reshape(x.shape)


@MODES
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group_norm_normalizes_each_group_of_each_sample(groups: int, training: bool, xp: Namespace) -> None:
    layer, x = filled(an.GroupNorm(groups, 6, xp=xp.module)).train(training), GROUP_NORM.x(xp=xp)
    assert_close(layer(x), affine(layer, group_hat(x, groups)))


def test_group_norm_takes_the_channels_from_its_axis() -> None:
    layer, moved, x = filled(an.GroupNorm(2, 6, axis=-1)), filled(an.GroupNorm(2, 6)), draw(3, 2, 2, 6)
    assert_close(layer(x), np.moveaxis(moved(np.moveaxis(x, -1, 1)), 1, -1))


def test_the_worked_vector_is_two_groups() -> None:
    y = an.GroupNorm(2, 2, eps=1e-5)(worked_vector())
    np.testing.assert_allclose(y.ravel(), L_Y, rtol=0, atol=DECIMALS_7)


@MODES
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5)])
def test_layer_norm_normalizes_over_the_last_dimensions(shape: tuple[int, ...], training: bool, xp: Namespace) -> None:
    layer, x = filled(an.LayerNorm(shape, xp=xp.module)).train(training), LAYER_NORM.x(xp=xp)
    axes = tuple(range(3 - len(shape), 3))
    assert_close(layer(x), normalized(x, axes) * wide(layer.weight) + wide(layer.bias))


@MODES
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize("eps", [None, 0.5])
def test_rms_norm_divides_by_the_root_mean_square(
    shape: tuple[int, ...], eps: float | None, training: bool, xp: Namespace
) -> None:
    layer, x = filled(an.RMSNorm(shape, eps, xp=xp.module)).train(training), RMS_NORM.x(xp=xp)
    axes = tuple(range(3 - len(shape), 3))
    added = np.finfo(np.float32).eps if eps is None else eps
    root = np.sqrt((wide(x) ** 2).mean(axes, keepdims=True) + added)
    assert_close(layer(x), wide(x) / root * wide(layer.weight))


@pytest.mark.parametrize("case", [GROUP_NORM, LAYER_NORM, RMS_NORM], ids=str)
def test_backward_is_the_derivative_of_forward(case: Case) -> None:
    layer = case.layer(dtype=np.float64)
    an.testing.gradcheck(layer, inputs=(case.x(dtype="float64"),), mode="directional")


@MODES
@pytest.mark.parametrize("case", [GROUP_NORM, LAYER_NORM, RMS_NORM], ids=str)
def test_a_forward_changes_nothing(case: Case, training: bool) -> None:
    layer = case.layer().train(training)
    before = held(layer)
    layer(case.x())
    assert held(layer) == before
