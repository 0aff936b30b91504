"""gradcheck where the forward has no derivative: the point is left out and named, and too many are an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arraynorm.testing import GradientError, KinkWarning, check_vjp, gradcheck

Array = Any
AT_KINK = np.array([-1.5, -0.5, 0.0, 0.75, 1.0])


def relu(x: Array) -> tuple[Array, Any]:
    return np.maximum(x, 0), x


def gradient_at_zero(value: float) -> Any:
    """relu's backward, with `value * dy` at the kink."""
    return lambda dy, x: (dy * np.where(x == 0, value, x > 0),)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 7.0])
def test_a_kink_is_named_and_left_out(value: float) -> None:
    with pytest.warns(KinkWarning, match=r"argument 0 \(x\) at \[2\]: from the left .*\(1 of 5 samples\)") as caught:
        gradcheck(relu, gradient_at_zero(value), (AT_KINK,))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_the_warning_gives_the_derivatives_on_both_sides() -> None:
    dys = []

    def backward(dy: Array, x: Array) -> tuple[Array]:
        dys.append(dy)
        return (dy * np.where(x > 0, 3.0, -2.0),)

    with pytest.warns(KinkWarning) as caught:
        gradcheck(lambda x: (np.where(x > 0, 3.0 * x, -2.0 * x), x), backward, (AT_KINK,))
    left, right = -2 * dys[0][2], 3 * dys[0][2]
    assert f"from the left {left:.6g}, from the right {right:.6g}" in str(caught[0].message)


def test_a_point_at_the_edge_of_the_domain_is_left_out() -> None:
    x = np.array([-1.0, 0.5, 0.25, 0.0, 1.0])

    def to_a_power(x: Array) -> tuple[Array, Any]:
        return (1 - x) ** 1.5, x

    with pytest.warns(KinkWarning, match=r"at \[4\]"):
        gradcheck(to_a_power, lambda dy, x: (-1.5 * dy * np.sqrt(1 - x),), (x,))
    with pytest.warns(KinkWarning), pytest.raises(GradientError, match=r"is wrong at \[0\]"):
        gradcheck(to_a_power, lambda dy, x: (-1.5 * dy * np.sqrt(1 - x) * (1 + 1e-6 * (x < 0)),), (x,))


def test_the_rest_is_still_compared() -> None:
    wrong_at_4 = np.array([1.0, 1.0, 1.0, 1.0, 1 + 1e-6])
    with pytest.warns(KinkWarning), pytest.raises(GradientError, match=r"is wrong at \[4\]"):
        gradcheck(relu, lambda dy, x: (dy * (x > 0) * wrong_at_4,), (AT_KINK,))


@pytest.mark.parametrize("distance", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_kink_near_a_point_is_no_kink_at_it(distance: float, offset: float) -> None:
    x = offset + np.array([-1.5, -distance, distance, 0.75, 1.0])

    def shifted_relu(x: Array) -> tuple[Array, Any]:
        return relu(x - offset)

    gradcheck(shifted_relu, gradient_at_zero(0.0), (x,))
    with pytest.raises(GradientError, match=r"is wrong at \[1\]"):
        gradcheck(shifted_relu, lambda dy, x: (dy * (x > -1),), (x,))


@pytest.mark.parametrize(
    ("function", "gradient"),
    [
        pytest.param(abs, np.sign, id="the zero of abs"),
        pytest.param(np.sign, np.zeros_like, id="a jump"),
        pytest.param(lambda x: np.sign(x) * np.sqrt(abs(x)), lambda x: 0.5 / np.sqrt(abs(x) + (x == 0)), id="a pole"),
    ],
)
def test_every_sort_of_kink_is_seen(function: Any, gradient: Any) -> None:
    with pytest.warns(KinkWarning, match=r"at \[2\]"):
        gradcheck(lambda x: (function(x), x), lambda dy, x: (dy * gradient(x),), (AT_KINK,))


@pytest.mark.parametrize("check", [gradcheck, check_vjp])
def test_more_kinks_than_a_quarter_are_an_error(check: Any) -> None:
    # along a random direction every element moves, so that one kink is in all samples
    x = np.array([0.0, 1.0, 0.0, 2.0]) if check is gradcheck else AT_KINK
    samples = "2 of 4" if check is gradcheck else "4 of 4"
    with pytest.raises(
        GradientError, match=rf"no derivative by argument 0 .*\({samples} samples\); move the inputs off"
    ):
        check(relu, gradient_at_zero(0.0), (x,))


def test_a_forward_that_rounds_to_float32_inside_does_not_pass() -> None:
    def rounding(x: Array) -> tuple[Array, Any]:
        return np.sin(x.astype(np.float32)).astype(np.float64), x

    with pytest.raises(GradientError, match="compute all of forward in float64"):
        gradcheck(rounding, lambda dy, x: (2 * dy * np.cos(x),), (AT_KINK,))
