"""gradcheck finds what may go wrong in a norm's backward, and passes the right one, on easy and on hard data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from arraynorm.testing import GradientError, check_vjp, gradcheck
from namespaces import Namespace
from testing.norm_cases import NORMS, NormCase, draw, terms

FAULTS: dict[str, Callable[[Any], Any]] = {
    "1e-6 too large": lambda gradient: gradient * (1 + 1e-6),
    "of the wrong sign": lambda gradient: -gradient,
    "transposed": lambda gradient: gradient.reshape(gradient.shape[::-1]).T if gradient.ndim > 1 else gradient[::-1],
}
# The mean and standard deviation of x: the digits that the mean takes from the deviations are gone in float64 too.
HARD = {"mean/std of 1e6": (1e6, 1.0), "a mean of 1 with std 1e-6": (1.0, 1e-6), "1e-6": (0, 1e-6), "1e6": (0, 1e6)}

each_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
each_gradient = pytest.mark.parametrize(
    ("norm", "gradient"), [pytest.param(n, g, id=f"{n.name}-{g}") for n in NORMS for g in n.gradients]
)


def sample(norm: NormCase) -> tuple[np.ndarray[Any, Any], Any]:
    """A dy and the cache of the real forward."""
    y, cache = norm.forward(*draw(norm))
    return np.random.default_rng(1).standard_normal(y.shape), cache


each_term = pytest.mark.parametrize(
    ("norm", "gradient", "left_out"),
    [
        pytest.param(norm, gradient, term, id=f"{norm.name}-{gradient}-{term}")
        for norm in NORMS
        for gradient, of_gradient in terms(norm, *sample(norm)).items()
        for term in of_gradient
    ],
)


def faulty(norm: NormCase, gradient: str, fault: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of `norm` with one gradient replaced by `fault(dy, cache)`."""

    def backward(dy: Any, cache: Any) -> Any:
        return norm.backward(dy, cache)._replace(**{gradient: fault(dy, cache)})

    return backward


def is_wrong(norm: NormCase, gradient: str) -> str:
    """A pattern of the message that blames this gradient."""
    return rf"the gradient of argument {norm.gradients.index(gradient)} \({gradient[1:]}\) is wrong"


@each_norm
def test_the_right_gradients_pass_element_by_element(norm: NormCase) -> None:
    gradcheck(norm.forward, norm.backward, draw(norm))


@each_norm
def test_the_right_gradients_pass_in_every_library(norm: NormCase, xp: Namespace) -> None:
    check_vjp(norm.forward, norm.backward, tuple(xp.asarray(x) for x in draw(norm)))


@each_norm
def test_the_terms_add_up_to_the_real_gradients(norm: NormCase) -> None:
    dy, cache = sample(norm)
    real = norm.backward(dy, cache)
    for gradient, of_gradient in terms(norm, dy, cache).items():
        size = max(float(np.max(abs(term))) for term in of_gradient.values())
        # the two add some 50 numbers in different orders
        np.testing.assert_allclose(
            sum(of_gradient.values()), getattr(real, gradient), rtol=0, atol=50 * size * np.finfo(float).eps
        )


@each_term
def test_a_dropped_term_is_found(norm: NormCase, gradient: str, left_out: str) -> None:
    def without(dy: Any, cache: Any) -> Any:
        kept = terms(norm, dy, cache)[gradient]
        return 0 * kept.pop(left_out) + sum(kept.values())

    with pytest.raises(GradientError, match=is_wrong(norm, gradient)):
        gradcheck(norm.forward, faulty(norm, gradient, without), draw(norm))


@each_gradient
@pytest.mark.parametrize("fault", FAULTS)
def test_a_gradient_that_is_slightly_or_grossly_wrong_is_found(norm: NormCase, gradient: str, fault: str) -> None:
    backward = faulty(norm, gradient, lambda dy, cache: FAULTS[fault](getattr(norm.backward(dy, cache), gradient)))
    with pytest.raises(GradientError, match=is_wrong(norm, gradient) + r" at \["):
        gradcheck(norm.forward, backward, draw(norm))
    with pytest.raises(GradientError, match=is_wrong(norm, gradient) + " along random direction"):
        check_vjp(norm.forward, backward, draw(norm))


@each_norm
@pytest.mark.parametrize("data", HARD)
def test_hard_data_neither_hide_a_fault_nor_raise_a_false_alarm(norm: NormCase, data: str) -> None:
    mean, std = HARD[data]
    forward, inputs = functools.partial(norm.forward, eps=0.0), draw(norm, mean=mean, std=std)
    check_vjp(forward, norm.backward, inputs)
    # 1e-5, since deviations from a mean 1e6 times as large have ten digits, and their differences seven
    slightly_off = faulty(norm, "dx", lambda dy, cache: norm.backward(dy, cache).dx * (1 + 1e-5))
    with pytest.raises(GradientError, match=is_wrong(norm, "dx")):
        check_vjp(forward, slightly_off, inputs)


@pytest.mark.parametrize("seed", range(4))
def test_what_cancels_within_the_norm_counts_as_rounding(seed: int) -> None:
    """With three values to a set, little is left of what the rounding of x is divided by: 1e-6 times cancellation."""
    norm = next(norm for norm in NORMS if norm.name == "instance_norm")
    gradcheck(functools.partial(norm.forward, eps=0.0), norm.backward, draw(norm, seed, mean=1.0, std=1e-6), seed=seed)
