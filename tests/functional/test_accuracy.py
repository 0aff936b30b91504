"""What every norm promises of its numbers: one table of tests over all of them. Bounds: tests/tolerances.py."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import arraynorm as an
from data import CONSTANTS, SIZES, hard, limits, spread
from namespaces import DTYPES, EVERY_PATH, NAMESPACES, NUMPY, to_numpy
from norms import (
    GIVEN,
    Example,
    backward,
    bare,
    draw,
    draw_dy,
    each_dtype,
    each_example,
    each_hard_data,
    exact,
    forward,
    to_library,
)
from tolerances import check, dtype_name

WITH_EPS = [op for op in GIVEN if op != "rms_norm"]
CENTERED = [op for op in WITH_EPS if "frozen" not in op]  # these subtract the mean of x itself

# Sets of 31 or 33 values, more than one, of more than one sample.
HARD_EXAMPLES = [
    *(Example(op, (3, 5, 11)) for op in GIVEN if op.startswith("batch_norm")),
    Example("instance_norm", (2, 3, 31)),
    Example("group_norm", (2, 6, 11), {"num_groups": 2}),
    Example("layer_norm", (5, 33), {"normalized_shape": (33,)}),
    Example("rms_norm", (5, 33), {"normalized_shape": (33,)}),
]


def _of_size(op: str, n: int) -> Example:
    """Sets of n values each."""
    match op:
        case "layer_norm" | "rms_norm":
            return Example(op, (3, n), {"normalized_shape": (n,)})
        case "group_norm":
            return Example(op, (2, 2, n), {"num_groups": 2})
        case "instance_norm":
            return Example(op, (2, 2, n))
    return Example(op, (n, 3))


def _refuses(op: str, n: int) -> bool:
    """One value has no deviation: these ops take it for a mistake and raise."""
    return n == 1 and op in ("batch_norm", "batch_norm_add_relu", "instance_norm")


SIZED = [_of_size(op, n) for op in GIVEN for n in SIZES if not _refuses(op, n)]


# -- within rounding of the exact result -----------------------------------------------------------------------


@pytest.mark.parametrize("example", HARD_EXAMPLES, ids=lambda example: example.op)
@each_hard_data
def test_hard_data_is_right_to_rounding(xp, dtype, name, example: Example):
    arrays = draw(example)
    sets = exact(example, arrays).sets
    arrays["x"] = spread(hard(name, dtype, *sets.shape), sets, example.shape)
    given = to_library(xp, arrays, dtype)
    if "mean" in arrays:  # those of the data; float16 holds no variance of an outlier
        channels = np.moveaxis(arrays["x"], 1, 0).reshape(example.shape[1], -1)
        given |= to_library(xp, {"mean": channels.mean(axis=1), "var": channels.var(axis=1)}, "float64")
    check(example, given, xp.asarray(draw_dy(example), dtype))


@pytest.mark.parametrize("example", SIZED, ids=str)
@each_dtype
def test_any_number_of_values_is_right_to_rounding(xp, dtype, example: Example):
    check(example, to_library(xp, draw(example), dtype), xp.asarray(draw_dy(example), dtype))


@each_example
@pytest.mark.parametrize("number_absent", [1, 2, 3])
def test_absent_parameters_and_addends_are_ones_and_zeros(xp, example: Example, number_absent):
    optional = [name for name in GIVEN[example.op] if name not in ("mean", "var")]
    for absent in itertools.combinations(optional, min(number_absent, len(optional))):
        arrays = draw(example) | dict.fromkeys(absent)
        check(example, to_library(xp, arrays, "float32"), xp.asarray(draw_dy(example), "float32"))


_MIXED = [(xp, x, given) for xp in EVERY_PATH for x in xp.dtypes for given in xp.dtypes if x != given]


@each_example
@pytest.mark.parametrize(("xp", "dtype", "given_dtype"), _MIXED, ids=lambda value: getattr(value, "name", value))
def test_parameters_and_dy_may_be_wider_or_narrower_than_x(xp, dtype, given_dtype, example: Example):
    """The computation dtype, that of dweight and dbias, is the widest of x, the parameters and float32."""
    arrays = draw(example)
    given = to_library(xp, arrays, given_dtype) | {"x": xp.asarray(arrays["x"], dtype)}
    check(example, given, xp.asarray(draw_dy(example), given_dtype))


def _unaligned(a: np.ndarray) -> np.ndarray:
    view = np.empty(a.nbytes + 1, dtype=np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


_LAYOUTS = {
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "reversed": lambda a: np.flip(np.ascontiguousarray(np.flip(a))),
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "unaligned": _unaligned,
}


@each_example
@pytest.mark.parametrize("layout", _LAYOUTS.values(), ids=_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layout_does_not_matter(example: Example, layout, dtype):
    given = {name: layout(array) for name, array in to_library(NUMPY, draw(example), dtype).items()}
    check(example, given, layout(NUMPY.asarray(draw_dy(example), dtype)))


@each_example
def test_zero_strides_are_read_like_a_copy(example: Example):
    given = to_library(NUMPY, draw(example), "float64")
    given["x"] = np.broadcast_to(given["x"][:, :, :1] + np.arange(5.0), example.shape)
    check(example, given, np.broadcast_to(1.0, example.shape))


# -- exactly ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [_of_size(op, n) for op in CENTERED for n in (7, 1023)], ids=str)
@pytest.mark.parametrize("value", CONSTANTS.values(), ids=CONSTANTS)
@each_dtype
def test_a_constant_set_gives_exactly_the_bias(xp, dtype, value, example: Example):
    x = np.full(example.shape, min(value, float(limits(dtype).max)))
    given = to_library(xp, draw(example) | {"x": x}, dtype)
    given.pop("addend", None)
    bias = to_numpy(given["bias"])
    expected = bias if example.op == "layer_norm" else bias.reshape(-1, *[1] * (len(example.shape) - 2))
    if example.op == "batch_norm_add_relu":
        expected = np.where(expected < 0, 0, expected)
    for eps in (1e-5, 0.1, 0.0):  # coefficients differ with the mean's size beside the standard deviation
        y = to_numpy(bare(example, given, eps=eps))
        np.testing.assert_array_equal(y.astype(np.float64), np.broadcast_to(expected, y.shape).astype(np.float64))
        assert not to_numpy(bare(example, given | {"bias": None}, eps=eps)).any()  # a bias would hide what is small


@each_dtype
@pytest.mark.parametrize("example", [_of_size(op, 33) for op in GIVEN], ids=str)
def test_zero_variance_and_zero_eps_give_the_bias_and_no_gradient(xp, dtype, example: Example):
    """rstd is 0, not infinity. For RMS norm that is a set of zeros."""
    arrays = draw(example) | {"x": np.zeros(example.shape)}
    if "var" in arrays:
        arrays["var"] *= 0
    given = to_library(xp, arrays, dtype)
    y, cache = forward(example, given, eps=0.0)
    gradients = backward(example, xp.asarray(draw_dy(example), dtype), cache)
    assert not to_numpy(cache.rstd).any()
    assert not to_numpy(gradients.dx).any()
    assert not to_numpy(gradients.dweight).any()
    without = bare(example, {name: a for name, a in given.items() if name != "weight"}, eps=0.0)
    np.testing.assert_array_equal(to_numpy(y), to_numpy(without))  # whatever the weight
    check(example._replace(options=example.options | {"eps": 0.0}), given, xp.asarray(draw_dy(example), dtype))


@pytest.mark.parametrize("example", [_of_size(op, n) for op in CENTERED for n in (31, 1023)], ids=str)
def test_float16_near_its_largest_value_does_not_overflow_the_statistics(example: Example):
    x = 65504.0 - 32 * (np.arange(np.prod(example.shape)) % 20)  # 32 is float16's spacing there
    given = to_library(NUMPY, draw(example) | {"x": x.reshape(example.shape)}, "float16")
    y, cache = forward(example, given | {"weight": None, "bias": None})
    assert np.isfinite(cache.mean).all()
    assert np.isfinite(y).all()
    assert np.abs(y).max() > 1
    check(example, given, NUMPY.asarray(draw_dy(example), "float16"))


# -- what is hurt by what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("example", [e for e in HARD_EXAMPLES if "frozen" not in e.op], ids=lambda e: e.op)
@each_dtype
def test_a_nan_or_infinity_hurts_its_own_set_alone(xp, dtype, example: Example, value):
    """The others keep every bit, of y and of dx; the hurt one says so, and does not look healthy."""
    arrays, dy = draw(example), draw_dy(example)
    norm = exact(example, arrays)
    hurt = arrays["x"].copy()
    hurt.reshape(-1)[norm.sets[1, 3]] = value
    results = []
    for x in (arrays["x"], hurt):
        y, cache = forward(example, to_library(xp, arrays | {"x": x}, dtype))
        dx = backward(example, xp.asarray(dy, dtype), cache).dx
        results.append([to_numpy(a).reshape(-1)[norm.sets].astype(np.float64) for a in (y, dx)])
    (y, dx), (hurt_y, hurt_dx) = results
    others = np.arange(len(norm.sets)) != 1
    np.testing.assert_array_equal(hurt_y[others], y[others])
    np.testing.assert_array_equal(hurt_dx[others], dx[others])
    assert np.isnan(hurt_dx[1]).all()
    if np.isinf(value) and example.op == "rms_norm":  # x / inf is 0, and only inf / inf is not a number
        np.testing.assert_array_equal(np.isnan(hurt_y[1]), np.arange(hurt_y.shape[1]) == 3)
    else:
        assert np.isnan(hurt_y[1]).all()


@pytest.mark.parametrize("example", [e for e in HARD_EXAMPLES if "batch_norm" in e.op], ids=lambda e: e.op)
def test_a_nan_in_one_channel_hurts_no_other_channels_gradients(xp, example: Example):
    arrays = draw(example)
    arrays["x"][1, 2, 3] = np.nan
    _, cache = forward(example, to_library(xp, arrays, "float32"))
    gradients = backward(example, xp.asarray(draw_dy(example), "float32"), cache)
    others = np.arange(example.shape[1]) != 2
    assert np.isfinite(to_numpy(gradients.dweight)[others]).all()
    assert np.isfinite(to_numpy(gradients.dbias)).all()
    assert np.isfinite(to_numpy(gradients.dx)[:, others]).all()


@pytest.mark.parametrize("op", ["batch_norm_frozen", "batch_norm_add_relu_frozen"])
@each_dtype
def test_a_nan_under_given_statistics_hurts_its_own_element_alone(xp, dtype, op):
    example = Example(op, (3, 5, 11))
    arrays, dy = draw(example), xp.asarray(draw_dy(example), dtype)
    arrays["x"][1, 2, 3] = np.nan
    y, cache = forward(example, to_library(xp, arrays, dtype))
    np.testing.assert_array_equal(np.argwhere(np.isnan(to_numpy(y).astype(np.float64))), [[1, 2, 3]])
    assert np.isfinite(to_numpy(backward(example, dy, cache).dx).astype(np.float64)).all()


# -- nothing to normalize --------------------------------------------------------------------------------------

EMPTY = [
    *(Example(op, shape) for op in GIVEN if op.startswith("batch_norm") for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0))),
    *(Example("instance_norm", shape) for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0))),
    *(Example("group_norm", shape, {"num_groups": 2}) for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0))),
    *(Example(op, (0, 4), {"normalized_shape": (4,)}) for op in ("layer_norm", "rms_norm")),
    *(Example(op, (3, 0), {"normalized_shape": (0,)}) for op in ("layer_norm", "rms_norm")),
    *(Example(op, (3, 0, 2), {"normalized_shape": (0, 2)}) for op in ("layer_norm", "rms_norm")),
]


@pytest.mark.parametrize("example", EMPTY, ids=str)
@each_dtype
def test_an_empty_input_gives_an_empty_output_and_zero_gradients(xp, dtype, example: Example):
    given = to_library(xp, draw(example), dtype)
    y, cache = forward(example, given)
    gradients = backward(example, xp.asarray(draw_dy(example), dtype), cache)
    for array in (y, gradients.dx):
        assert (array.shape, array.dtype) == (example.shape, given["x"].dtype)
    for name in {"weight", "bias"} & given.keys():
        gradient = getattr(gradients, f"d{name}")
        assert gradient.shape == given[name].shape
        assert dtype_name(gradient) == ("float64" if dtype == "float64" else "float32")
        assert not to_numpy(gradient).any()
    assert np.isfinite(to_numpy(cache.rstd)).all()


def test_every_functional_norm_is_in_the_table():
    """A norm that is added and not tabled here would go untested."""
    ops = {name.removesuffix("_backward") for name in an.functional.__all__ if name.endswith("_backward")}
    assert ops == set(GIVEN)
    assert {xp.name for xp in NAMESPACES} >= {"numpy", "read-only numpy", "array-api-strict"}
