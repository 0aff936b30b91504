"""What gradcheck promises of any forward and backward: what it compares, what it refuses, what it says."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import array_api_strict
import numpy as np
import pytest
from array_api_compat import array_namespace

from arraynorm.testing import GradientError, check_vjp, gradcheck
from namespaces import Namespace, to_numpy

Array = Any
X, W = np.linspace(-1.0, 2.0, 6).reshape(2, 3), np.array([0.5, -1.0, 2.0])


def forward(x: Array, w: Array) -> tuple[Array, Any]:
    """y = sin(x) * w."""
    xp = array_namespace(x)
    return xp.sin(x) * w, (xp, x, w)


def backward(dy: Array, cache: Any) -> tuple[Array, Array]:
    xp, x, w = cache
    return dy * xp.cos(x) * w, xp.sum(dy * xp.sin(x), axis=0)


def with_gradients(change: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    """The right backward, whose gradients (dx, dw) pass through `change`."""
    return lambda dy, cache: change(*backward(dy, cache))


# -- what is compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "directional"])
def test_right_gradients_pass_in_every_library(xp: Namespace, mode: Any) -> None:
    gradcheck(forward, backward, (xp.asarray(X), xp.asarray(W)), mode=mode)


def test_forward_gets_the_very_arrays_it_is_to_be_tested_with() -> None:
    seen = []

    def recording(x: Array, w: Array) -> tuple[Array, Any]:
        seen.append((x, w))
        return forward(x, w)

    transposed, reversed_w = X.T.copy().T, W[::-1]
    gradcheck(recording, backward, (transposed, reversed_w))
    assert seen[0][0] is transposed
    assert seen[0][1] is reversed_w


def test_the_seed_alone_decides_the_dy_and_the_directions() -> None:
    def run(seed: int) -> list[np.ndarray[Any, Any]]:
        seen = []

        def recording(x: Array, w: Array) -> tuple[Array, Any]:
            seen.append(x.copy())
            return forward(x, w)

        def recording_dy(dy: Array, cache: Any) -> Any:
            seen.append(dy.copy())
            return backward(dy, cache)

        check_vjp(recording, recording_dy, (X, W), seed=seed)
        return seen

    first, again, other = run(0), run(0), run(1)
    assert [a.tobytes() for a in first] == [a.tobytes() for a in again]
    assert first[1].tobytes() != other[1].tobytes()


def test_the_calls_of_a_vjp_do_not_grow_with_the_input() -> None:
    calls = []

    def counting(x: Array) -> tuple[Array, Any]:
        calls.append(x.size)
        return np.sin(x), x

    rng = np.random.default_rng(0)
    for size in (10, 10_000):
        check_vjp(counting, lambda dy, x: (dy * np.cos(x),), (rng.standard_normal(size),))
    small, large = calls.count(10), calls.count(10_000)
    assert large <= 1.5 * small


def test_an_offset_of_the_input_costs_no_more_steps() -> None:
    calls = []

    def counting(x: Array, offset: float) -> tuple[Array, Any]:
        calls.append(offset)
        return np.sin(x - offset), x - offset

    for offset in (0.0, 1e6):
        counted = functools.partial(counting, offset=offset)
        check_vjp(counted, lambda dy, x: (dy * np.cos(x),), (X + offset,))
    assert calls.count(1e6) <= 1.5 * calls.count(0.0)


@pytest.mark.parametrize(
    ("shape", "function", "derivative"),
    [
        pytest.param((), np.sin, np.cos, id="a 0-d input"),
        pytest.param((0, 3), np.sin, np.cos, id="an empty input"),
        pytest.param((1,), np.exp, np.exp, id="one element"),
    ],
)
@pytest.mark.parametrize("mode", ["full", "directional"])
def test_unusual_shapes_pass(shape: tuple[int, ...], function: Any, derivative: Any, mode: Any) -> None:
    gradcheck(lambda x: (np.asarray(function(x)), x), lambda dy, x: (dy * derivative(x),), (np.ones(shape),), mode=mode)


HARD: dict[str, tuple[Any, Any, Any]] = {
    "a 0-d y": (X, lambda x: np.asarray(np.sum(np.sin(x))), lambda dy, x: dy * np.cos(x)),
    "steps that leave the domain": (np.exp(5 * X), np.log, lambda dy, x: dy / x),
    "elements of very different size": (np.exp(5 * X), np.square, lambda dy, x: 2 * dy * x),
    "gradients of very different size": (10 * X, np.exp, lambda dy, x: dy * np.exp(x)),
    "many oscillations within the spread of x": (
        X,
        lambda x: np.sin(100 * x),
        lambda dy, x: 100 * dy * np.cos(100 * x),
    ),
    "a large offset of y": (X, lambda x: np.sin(x) + 1e6, lambda dy, x: dy * np.cos(x)),
    "a large offset of x": (X + 1e6, lambda x: np.sin(x - 1e6), lambda dy, x: dy * np.cos(x - 1e6)),
    "a gradient of zero": (X, lambda x: x - x, lambda dy, x: 0 * dy),
    "a gradient that is rounding": (X, lambda x: (x + 1) - x, lambda dy, x: (dy * 3 - dy) - 2 * dy),
    "equal elements": (np.full((2, 3), 0.3), np.sin, lambda dy, x: dy * np.cos(x)),
    "first steps into saturation": (np.append(X, 1e11), np.tanh, lambda dy, x: dy * (1 - np.tanh(x) ** 2)),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("mode", ["full", "directional"])
def test_hard_functions_raise_no_false_alarm(case: str, mode: Any) -> None:
    x, function, gradient = HARD[case]
    gradcheck(lambda x: (function(x), x), lambda dy, x: (gradient(dy, x),), (x,), mode=mode)


@pytest.mark.parametrize("case", [case for case in HARD if "gradient" not in case])
@pytest.mark.parametrize("mode", ["full", "directional"])
def test_hard_functions_do_not_hide_a_fault(case: str, mode: Any) -> None:
    x, function, gradient = HARD[case]
    with pytest.raises(GradientError, match="is wrong"):
        gradcheck(lambda x: (function(x), x), lambda dy, x: ((1 + 1e-5) * gradient(dy, x),), (x,), mode=mode)


def test_a_channel_of_small_gradients_is_not_measured_by_a_large_one() -> None:
    weight = np.array([1e-6, 1e6])

    def slightly_wrong(dy: Array, x: Array) -> tuple[Array]:
        return (dy * np.cos(x) * weight * np.array([1 + 1e-6, 1]),)

    with pytest.raises(GradientError, match=r"wrong at \[\d, 0\].*\(3 of 6 samples are wrong\)"):
        gradcheck(lambda x: (np.sin(x) * weight, x), slightly_wrong, (X.reshape(3, 2),))


@pytest.mark.parametrize(("options", "passes"), [({}, False), ({"rtol": 1e-3}, True), ({"atol": 1e-3}, True)])
@pytest.mark.parametrize("check", [gradcheck, check_vjp])
def test_rtol_and_atol_allow_what_they_say(check: Any, options: dict[str, float], passes: bool) -> None:
    slightly_wrong = with_gradients(lambda dx, dw: (dx * (1 + 1e-5), dw))
    if passes:
        check(forward, slightly_wrong, (X, W), **options)
    else:
        with pytest.raises(GradientError):
            check(forward, slightly_wrong, (X, W), **options)


# -- what the error says ---------------------------------------------------------------------------------------


def test_the_error_names_the_argument_the_worst_element_and_both_values() -> None:
    dys = []

    def two_faults(dy: Array, cache: Any) -> tuple[Array, Array]:
        dys.append(dy)
        dx, dw = backward(dy, cache)
        return dx, dw * np.array([1 + 1e-5, 3.0, 1.0])

    with pytest.raises(GradientError) as caught:
        gradcheck(forward, two_faults, (X, W))
    text = str(caught.value)
    right = float(np.sum(dys[0] * np.sin(X), axis=0)[1])
    assert "the gradient of argument 1 (w) is wrong at [1]" in text
    assert "(2 of 3 samples are wrong)" in text
    values = re.search(r"backward gives (\S+), differences give (\S+): an error of (\S+), where (\S+) is allowed", text)
    assert values is not None
    analytic, numeric, error, allowed = (float(value) for value in values.groups())
    # 1e-9: the differences' own error; the message rounds errors to two digits
    assert analytic == pytest.approx(3 * right, rel=1e-9)
    assert numeric == pytest.approx(right, rel=1e-9)
    assert error == pytest.approx(abs(2 * right), rel=0.05)
    assert 0 < allowed < 1e-6 * abs(right)


class WithoutSignature:
    """As some builtins are."""

    __signature__ = "none"

    def __call__(self, *arrays: Array) -> tuple[Array, Any]:
        return forward(*arrays)


@pytest.mark.parametrize("nameless", [lambda *arrays: forward(*arrays), WithoutSignature()])
def test_arguments_without_a_name_are_numbered(nameless: Any) -> None:
    with pytest.raises(GradientError, match="gradient of argument 1 is wrong"):
        gradcheck(nameless, with_gradients(lambda dx, dw: (dx, -dw)), (X, W))


# -- what a backward must return, whatever its numbers ---------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dx, dw: (dx, dw[None, :]), r"gradient of argument 1 \(w\) must have shape \(3,\), got \(1, 3\)"),
        (lambda dx, dw: (dx.T, dw), r"gradient of argument 0 \(x\) must have shape \(2, 3\), got \(3, 2\)"),
        (lambda dx, dw: (dx, dw.astype(np.float32)), r"argument 1 \(w\) must be float64, got float32"),
        (lambda dx, dw: (array_api_strict.asarray(dx), dw), r"argument 0 \(x\) must be a numpy array, got Array"),
        (lambda dx, dw: (dx.tolist(), dw), r"argument 0 \(x\) must be a numpy array, got list"),
        (lambda dx, dw: (dx, dw * np.array([1.0, np.nan, 1.0])), r"argument 1 \(w\) must be finite, got nan at \[1\]"),
        (lambda dx, dw: (dx, np.array([1.0, 1.0, np.inf])), r"argument 1 \(w\) must be finite, got inf at \[2\]"),
        (lambda dx, dw: (dx,), r"the gradient of argument 1 \(w\) is missing"),
        (lambda dx, dw: (dx, None), r"the gradient of argument 1 \(w\) is missing"),
        (lambda dx, dw: (dx, dw, dw), "the gradient of an absent argument must be None"),
        (lambda dx, dw: dx, "backward must return a sequence of gradients, got ndarray"),
        (lambda dx, dw: None, "backward must return a sequence of gradients, got NoneType"),
    ],
)
def test_a_gradient_of_the_wrong_kind_is_found(change: Any, message: str) -> None:
    with pytest.raises(GradientError, match=message):
        gradcheck(forward, with_gradients(change), (X, W))


def test_a_gradient_in_numpy_for_another_library_is_found() -> None:
    inputs = array_api_strict.asarray(X), array_api_strict.asarray(W)
    with pytest.raises(GradientError, match=r"argument 0 \(x\) must be a array_api_strict array, got ndarray"):
        gradcheck(forward, with_gradients(lambda dx, dw: (to_numpy(dx), dw)), inputs)


def test_gradients_of_arguments_left_out_may_be_none() -> None:
    gradcheck(forward, with_gradients(lambda dx, dw: (dx, dw, None, None)), (X, W))


def test_none_stands_for_an_absent_argument() -> None:
    def optional(x: Array, w: Array = None, b: Array = None) -> tuple[Array, Any]:
        return (np.sin(x) if w is None else np.sin(x) * w) + (0 if b is None else b), (x, w)

    def gradients(dy: Array, cache: Any) -> tuple[Array, Array | None, Array]:
        x, w = cache
        return dy * np.cos(x) * (1 if w is None else w), None, np.sum(dy, axis=0)

    gradcheck(optional, gradients, (X, None, W))
    with pytest.raises(GradientError, match=r"the gradient of argument 2 \(b\) must be None"):
        gradcheck(optional, gradients, (X, None, None))
    with pytest.raises(GradientError, match=r"the gradient of argument 1 \(w\) is missing"):
        gradcheck(optional, gradients, (X, W, W))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (lambda x: x.astype(np.float32), "y must be float64, got float32"),
        (lambda x: array_api_strict.asarray(x), "y must be a numpy array, got Array"),
        (lambda x: x.tolist(), "y must be a numpy array, got list"),
        (lambda x: x * np.inf, r"y must be finite, got -inf at \[0, 0\]"),
    ],
)
def test_a_y_of_the_wrong_kind_is_found(y: Any, message: str) -> None:
    with pytest.raises(GradientError, match=message):
        gradcheck(lambda x: (y(x), None), lambda dy, _: (dy,), (X + 10 * (X >= 0) - 10,))


def test_a_y_whose_shape_depends_on_the_values_is_found() -> None:
    with pytest.raises(GradientError, match=r"y must keep its shape"):
        gradcheck(lambda x: (x[x > X[0, 0] - 1e-3], x), lambda dy, x: (np.ones_like(x),), (X,))


# -- side effects ----------------------------------------------------------------------------------------------


def test_a_forward_that_is_not_deterministic_is_found() -> None:
    calls = iter(range(1000))
    with pytest.raises(GradientError, match="y differs between two runs"):
        gradcheck(lambda x: (x + 1e-15 * next(calls), None), lambda dy, _: (dy,), (X,))


def test_a_backward_that_is_not_deterministic_is_found() -> None:
    calls = iter(range(1000))
    with pytest.raises(GradientError, match=r"the gradient of argument 1 \(w\) differs between two runs"):
        gradcheck(forward, with_gradients(lambda dx, dw: (dx, dw * (1 + 1e-15 * next(calls)))), (X, W))


@pytest.mark.parametrize("position", [0, 1])
def test_a_forward_that_writes_to_its_inputs_is_found(position: int) -> None:
    def writing(x: Array, w: Array) -> tuple[Array, Any]:
        result = forward(x, w)
        (x, w)[position][...] *= 1 + 1e-15
        return result

    with pytest.raises(GradientError, match=rf"argument {position} \({'xw'[position]}\) was written to"):
        gradcheck(writing, backward, (X.copy(), W.copy()))


@pytest.mark.parametrize(("victim", "name"), [(0, "dy"), (1, r"argument 0 \(x\)"), (2, r"argument 1 \(w\)")])
def test_a_backward_that_writes_to_dy_or_to_the_inputs_is_found(victim: int, name: str) -> None:
    def writing(dy: Array, cache: Any) -> Any:
        gradients = backward(dy, cache)
        (dy, *cache[1:])[victim][...] = 0
        return gradients

    with pytest.raises(GradientError, match=f"{name} was written to"):
        gradcheck(forward, writing, (X.copy(), W.copy()))


def test_a_function_may_reuse_the_memory_of_what_it_returned() -> None:
    y, dx = np.empty_like(X), np.empty_like(X)
    gradcheck(lambda x: (np.sin(x, out=y), x), lambda dy, x: (np.multiply(dy, np.cos(x), out=dx),), (X,))


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "name"),
    [
        (X.astype(np.float32), "must be float64, got float32"),
        (X.astype(np.float16), "must be float64, got float16"),
        (X.astype(">f8"), "must be float64, got >f8"),
        (X.astype(np.complex128), "must be float64, got complex128"),
        (np.arange(6).reshape(2, 3), "must be float64, got int64"),
        (array_api_strict.asarray(X, dtype=array_api_strict.float32), "must be float64, got float32"),
        (X.tolist(), "must be an array or None, got list"),
        (1.0, "must be an array or None, got float"),
        (np.float64(1.0), "must be an array or None, got float64"),
    ],
)
@pytest.mark.parametrize("check", [gradcheck, check_vjp])
def test_inputs_in_anything_but_float64_are_refused(check: Any, x: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"argument 0 \(x\) {name}"):
        check(forward, backward, (x, W))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((forward, backward, (X, np.array([1.0, np.nan, 1.0]))), ValueError, r"argument 1 \(w\) must be finite"),
        ((forward, backward, ()), ValueError, "inputs must hold at least one array"),
        ((forward, backward, (None, None)), ValueError, "inputs must hold at least one array"),
        ((forward, backward, X), TypeError, "inputs must be a sequence of arrays, got ndarray"),
        ((forward, None, (X, W)), TypeError, "backward must be callable, got NoneType"),
        ((forward, (X, W)), TypeError, "backward must be callable, got tuple"),
        ((lambda x: x, backward, (X,)), TypeError, r"forward must return \(y, cache\), got ndarray"),
        ((lambda x: (x, x, x), backward, (X,)), TypeError, r"forward must return \(y, cache\), got tuple"),
    ],
)
def test_misuse_has_an_error_of_its_own(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gradcheck(*arguments)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r'mode must be "full" or "directional", got \'fast\''):
        gradcheck(forward, backward, (X, W), mode="fast")  # type: ignore[arg-type]


def test_an_error_in_forward_or_backward_reaches_the_caller() -> None:
    def failing(*_: Any) -> Any:
        raise ZeroDivisionError("from inside")

    with pytest.raises(ZeroDivisionError, match="from inside"):
        gradcheck(failing, backward, (X, W))
    with pytest.raises(ZeroDivisionError, match="from inside"):
        gradcheck(forward, failing, (X, W))


@pytest.mark.parametrize("frequency", [2.0**power * np.pi for power in range(2, 11)])
def test_a_function_whose_period_is_a_power_of_two_is_judged_right(frequency: float) -> None:
    x = np.random.default_rng(0).uniform(size=5)

    def forward(x: Array) -> tuple[Array, Array]:
        return np.sin(frequency * x), x

    gradcheck(forward, lambda dy, x: (dy * frequency * np.cos(frequency * x),), (x,))
    with pytest.raises(GradientError):
        gradcheck(forward, lambda dy, x: (dy * 0,), (x,))


@pytest.mark.parametrize("x", [2.0 ** np.arange(7), np.arange(1.0, 33)], ids=["powers", "counts"])
def test_a_step_that_hits_a_pole_is_passed_over(x: Array) -> None:
    def forward(x: Array) -> tuple[Array, Array]:
        return 1 / x, x

    gradcheck(forward, lambda dy, x: (-dy / x**2,), (x,))
    with pytest.raises(GradientError, match="is wrong"):
        gradcheck(forward, lambda dy, x: (-dy / x**2 * np.where(x == 1, 5, 1),), (x,))
