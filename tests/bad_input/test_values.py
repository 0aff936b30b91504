"""Sizes of zero and one, and values that are not finite or not far from it: legal, or refused; never a wrong answer."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from bad_input.calls import CALLS, OPS, SHAPE, Arguments, Call, backward_arguments, good
from bad_input.witness import assert_refused, leaves, noted

EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
NORMS = [call for call in CALLS if call.name in OPS]
QUANTIZED = [call for call in CALLS if call.op.startswith("quantized")]
FLOATING = [call for call in CALLS if call not in QUANTIZED]
EMPTY = {
    "no samples": (0, 3, 2, 5),
    "no channels": (4, 0, 2, 5),
    "no spatial elements": (4, 3, 0, 5),
    "nothing": (0, 0, 0, 0),
}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@EVERY_CALL
def test_an_empty_input_gives_empty_results_and_gradients_of_zero(call: Call, shape: tuple[int, ...]) -> None:
    arguments = call.make(shape)
    result = call.function(**arguments)
    if "running_mean" in arguments:
        for name, new in zip(("running_mean", "running_var"), result, strict=True):
            np.testing.assert_array_equal(new, arguments[name], err_msg="an empty batch moves nothing")
        return
    y, *others = result if isinstance(result, tuple) else (result,)
    assert y.shape == shape
    for gradient in others if call.name.endswith("_backward") else ():
        assert not gradient.any(), "no samples have no gradient"
        assert gradient.shape in (shape, shape[1:2], shape[2:])


@pytest.mark.parametrize("call", NORMS, ids=lambda call: call.name)
def test_one_value_is_refused_where_its_variance_is_meaningless_and_else_gives_the_bias(call: Call) -> None:
    arguments = call.make((1, 3, 1, 1))
    if call.op in ("batch_norm", "batch_norm_add_relu", "instance_norm"):
        assert_refused(call.function, arguments, (ValueError,), call.op, "x")
    elif call.op in ("group_norm", "layer_norm"):
        bias = arguments["bias"].reshape((1, 3, 1, 1) if call.op == "group_norm" else (1, 1, 1, 1))
        np.testing.assert_array_equal(call.function(**arguments), np.broadcast_to(bias, (1, 3, 1, 1)))
    else:
        assert np.isfinite(call.function(**arguments)).all()


# -- values that are not finite --------------------------------------------------------------------------------

PLACES = (7, 68)
"""Two elements of x in one channel but different samples; in a parameter the first counts, modulo its size."""
EXTREME = {
    "nan": (np.nan, np.nan),
    "inf": (np.inf, np.inf),
    "-inf": (-np.inf, -np.inf),
    "both infinities": (np.inf, -np.inf),
    "the largest float": (1.7e308, 1.7e308),
    "both largest floats": (1.7e308, -1.7e308),
    "subnormal": (5e-324, -5e-324),
}


def with_values(arguments: Arguments, name: str, numbers: tuple[float, float], *, add: bool = False) -> Arguments:
    """The arguments with two elements of one of them replaced, or moved; of a cache's, x is the one."""
    array = (arguments["cache"].x if name == "cache.x" else arguments[name]).copy()
    for place, number in zip(PLACES, numbers, strict=True):
        place %= array.size
        array.flat[place] = array.flat[place] + number if add else number
    return arguments | {name: array}


def floating(arguments: Arguments) -> list[str]:
    return [
        name
        for name, value in arguments.items()
        if isinstance(value, np.ndarray) and value.dtype == np.float64 and name != "out"
    ]


def reached(call: Call, name: str, clean: dict[str, Any]) -> dict[str, Any]:
    """Which elements of the results depend on the two: finite changes of them show it."""
    changed = {path: np.zeros(np.shape(value), bool) for path, value in clean.items()}
    for step in ((0.5, 0.3), (-0.4, 40.0), (50.0, -0.7)):
        result = call.function(**with_values(call.make(SHAPE), name, step, add=True))
        for path, value in leaves(result):
            changed[path] |= value != clean[path]
    return changed


@pytest.mark.parametrize("call", FLOATING, ids=lambda call: call.name)
def test_a_value_that_is_not_finite_hurts_only_what_depends_on_it(call: Call) -> None:
    clean = dict(leaves(call.function(**call.make(SHAPE))))
    complaints: list[str] = []
    for name in floating(call.make(SHAPE)):
        dependent = reached(call, name, clean)
        for words, numbers in EXTREME.items():
            with noted(complaints, f"{name} holds {words}"):
                for path, value in leaves(call.function(**with_values(call.make(SHAPE), name, numbers))):
                    # after a ReLU a 0, or its bit in the mask, shows no dependence: such elements are left out
                    apart = ~dependent[path] & (clean[path] != 0) & (value.dtype != np.uint8)
                    np.testing.assert_array_equal(value[apart], clean[path][apart], err_msg=path)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("call", QUANTIZED, ids=lambda call: call.name)
def test_quantized_ops_refuse_statistics_and_parameters_that_are_not_finite(call: Call) -> None:
    complaints: list[str] = []
    for name in floating(call.make(SHAPE)):
        for words in ("nan", "inf", "-inf"):
            with noted(complaints, f"{name} holds {words}"):
                arguments = with_values(call.make(SHAPE), name, EXTREME[words])
                # they are checked after they have been combined to y = a x + b
                assert_refused(call.function, arguments, (ValueError,), call.op, f"{name}|weight|bias")
    with noted(complaints, "var holds a negative number"):
        arguments = with_values(call.make(SHAPE), "var", (-1.0, -1.0))
        assert_refused(call.function, arguments, (ValueError,), call.op, "var")
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("call", QUANTIZED, ids=lambda call: call.name)
@pytest.mark.parametrize("scales", [(1e308, 1.0), (1.0, 5e-324), (1e308, 5e-324), (5e-324, 1e308)])
@pytest.mark.parametrize("weight", [0.0, 1.0, -1e300])
def test_quantized_ops_saturate_at_scales_near_the_limits(
    call: Call, scales: tuple[float, float], weight: float
) -> None:
    x_scale, y_scale = scales
    settings = {"x_scale": x_scale, "x_zero_point": 7, "y_scale": y_scale, "y_zero_point": 9, "eps": 0.0}
    xq = np.array([[0], [7], [255]], np.uint8)
    one = np.ones(1)
    found = call.function(xq, mean=0 * one, var=one, weight=weight * one, bias=0.5 * one, **settings)

    def exact(q: int) -> int:
        v = (q - 7) * Fraction(x_scale) * Fraction(weight) + Fraction(0.5)
        v = max(v, Fraction(0)) if call.op.endswith("relu") else v
        return min(max(round(v / Fraction(y_scale)) + 9, 0), 255)

    assert found[:, 0].tolist() == [exact(0), exact(7), exact(255)]


@pytest.mark.parametrize("scale", [1e150, 1e155, 1e300])
@pytest.mark.parametrize("call", [c for c in NORMS if "frozen" not in c.op], ids=lambda call: call.name)
def test_deviations_whose_squares_float64_does_not_hold_give_nan_and_no_wrong_number(call: Call, scale: float) -> None:
    arguments, expected = call.make(SHAPE), call.function(**call.make(SHAPE) | {"eps": 0.0})
    if "addend" in arguments:
        arguments["addend"] = None
        expected = call.function(**call.make(SHAPE) | {"eps": 0.0, "addend": None})
    y = call.function(**arguments | {"x": arguments["x"] * scale, "eps": 0.0})
    if scale < 1e154:
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)  # 40 values, whose scale is no power of 2
    else:
        assert np.isnan(y).all()


@pytest.mark.parametrize("op", OPS)
def test_a_sum_beyond_float32_is_infinite_without_a_warning(op: str) -> None:
    arguments = backward_arguments(op, SHAPE)
    fields = arguments["cache"]._asdict()
    narrow = {key: np.abs(fields[key]).astype(np.float32) for key in ("x", "weight", "bias") if key in fields}
    dy = np.full(SHAPE, 3e38, np.float32)
    gradients = getattr(an, f"{op}_backward")(dy, arguments["cache"]._replace(**narrow))
    assert gradients.dx.dtype == np.float32
    if op != "rms_norm":
        # 40 values of 3e38, or as many as the ReLU lets through, where float32 ends at 3.4e38
        assert np.isposinf(gradients.dbias).all()


def test_running_statistics_take_instances_of_both_infinities() -> None:
    x = good("instance_norm", "x", SHAPE)
    x[0, 0], x[1, 0] = np.inf, -np.inf
    _, cache = an.instance_norm_forward(x)
    mean, _ = an.update_running_stats(np.zeros(3), np.ones(3), cache)
    assert np.isfinite(mean).tolist() == [False, True, True]


def test_running_statistics_near_the_largest_float_overflow_to_infinity() -> None:
    _, cache = an.batch_norm_forward(np.array([[0.0], [1.0]]))
    cache = cache._replace(var=np.array([1.7e308]))
    _, var = an.update_running_stats(np.zeros(1), np.ones(1), cache, momentum=1.0)
    assert np.isposinf(var).all()
