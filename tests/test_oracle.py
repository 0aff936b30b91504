"""The oracle itself: against values worked out by hand, and against differences of its own forward."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import oracle
from data import hard, hard_names, spread
from namespaces import NUMPY
from norms import GIVEN, Example, draw, draw_dy, each_example, exact, to_library
from tolerances import check

ARITHMETICS = [oracle.longdoubles, oracle.decimals]


@pytest.fixture(params=ARITHMETICS, ids=lambda arithmetic: arithmetic.__name__)
def arithmetic(request, monkeypatch):
    """Both, on every machine: where longdouble is double it is right to 1e-15 only, and not the oracle's choice."""
    monkeypatch.setattr(oracle, "wide", request.param)
    return request.param


@pytest.fixture
def in_decimals(monkeypatch):
    monkeypatch.setattr(oracle, "wide", oracle.decimals)


def test_two_values_come_out_as_worked_by_hand(arithmetic):
    """x = (1, 3): mean 2, variance 1; with eps = 3, rstd = 1/2 and x_hat = (-1/2, 1/2)."""
    norm = oracle.layer_norm(np.array([[1.0, 3.0]]), 2, np.array([1.0, 4.0]), np.array([0.0, 10.0]), eps=3.0)
    assert [Fraction(float(v)) for v in norm.y.reshape(-1)] == [Fraction(-1, 2), 12]
    # g = dy * weight = (1, 0): rstd * (g - 1/2 - x_hat * mean(g * x_hat)) = 1/2 * ((1/2, -1/2) + (-1/2, 1/2) / 4)
    dx, dweight, dbias, _ = norm.backward(np.array([[1.0, 0.0]]))
    assert [float(v) for v in dx.reshape(-1)] == [3 / 16, -3 / 16]
    assert [float(v) for v in dweight] == [-1 / 2, 0]
    assert [float(v) for v in dbias] == [1, 0]


def test_the_root_mean_square_of_3_and_4_is_worked_by_hand(arithmetic):
    """mean square 25/2; with eps = 7/2, rstd = 1/4."""
    norm = oracle.rms_norm(np.array([[3.0, 4.0]]), 2, np.array([1.0, 2.0]), eps=3.5)
    assert [float(v) for v in norm.y.reshape(-1)] == [3 / 4, 2]
    # g = (1, 0): rstd * (g - x_hat * mean(g * x_hat)) = 1/4 * ((1, 0) - (3/4, 1) * 3/8)
    assert [float(v) for v in norm.backward(np.array([[1.0, 0.0]])).dx.reshape(-1)] == [23 / 128, -3 / 32]


@each_example
def test_every_gradient_is_the_limit_of_differences(in_decimals, example: Example):
    """Central differences along a direction of integers: exact inputs, 100 digits, so only h^2 = 2^-52 remains."""
    rng = np.random.default_rng(2)
    h = 2.0**-26
    arrays = {name: np.round(array * 256) / 256 for name, array in draw(example).items()}
    dy = draw_dy(example)
    gradients = exact(example, arrays).backward(dy)
    for name in {"x", *GIVEN[example.op]} - {"mean", "var"}:
        v = rng.integers(1, 4, arrays[name].shape) * rng.choice([-1, 1], arrays[name].shape)
        above, below = (exact(example, {**arrays, name: arrays[name] + step * v}).y for step in (h, -h))
        numeric = np.vdot(dy, oracle.narrow((above - below) / oracle.wide(2 * h)))
        analytic = np.vdot(oracle.narrow(getattr(gradients, f"d{name}")).reshape(v.shape), v)
        assert numeric == pytest.approx(analytic, rel=1e-12), name


@each_example
@pytest.mark.parametrize("name", hard_names("float64"))
def test_both_arithmetics_see_the_same_numbers(monkeypatch, example: Example, name):
    arrays = _with_hard_data(example, name)
    y, gradients = exact(example, arrays).y, exact(example, arrays).backward(draw_dy(example))
    chosen = [oracle.narrow(a) for a in (y, *gradients) if a is not None]
    monkeypatch.setattr(oracle, "wide", oracle.decimals)
    y, gradients = exact(example, arrays).y, exact(example, arrays).backward(draw_dy(example))
    decimal = [oracle.narrow(a) for a in (y, *gradients) if a is not None]
    for a, b in zip(chosen, decimal, strict=True):
        # 2^-64 of rounding, times a mean/std of up to 3e12 (1e10 constant, eps 1e-5)
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


@each_example
@pytest.mark.parametrize("name", hard_names("float64"))
def test_the_package_passes_under_the_fallback_arithmetic(in_decimals, example: Example, name):
    arrays = to_library(NUMPY, _with_hard_data(example, name), "float64")
    check(example, arrays, draw_dy(example))


def test_nan_and_infinity_are_values_in_both_arithmetics(arithmetic):
    x = np.array([[1.0, 2.0, 4.0], [np.nan, 2.0, 3.0], [np.inf, 2.0, 3.0]])
    norm = oracle.layer_norm(x, 3)
    for result in (norm.y, norm.backward(np.ones_like(x)).dx):
        np.testing.assert_array_equal(np.isnan(oracle.narrow(result)).all(axis=1), [False, True, True])


def _with_hard_data(example: Example, name: str) -> dict[str, np.ndarray]:
    arrays = draw(example)
    sets = exact(example, arrays).sets
    return {**arrays, "x": spread(hard(name, "float64", *sets.shape), sets, example.shape)}
