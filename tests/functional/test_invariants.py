"""What holds for any input: symmetries of each norm, and what the norms are to each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import arraynorm as an
from norms import GIVEN, Example, backward, bare, draw, draw_dy, forward
from tolerances import EPS64, C

CENTERED = ["batch_norm", "instance_norm", "group_norm", "layer_norm"]
NORMS = [*CENTERED, "rms_norm"]  # with statistics of x itself, and without ReLU

# Both sides of an equation come with a bound of tests/tolerances.py: C = 6 each, (1 + mean/std) about 2 on what is
# drawn here, and the other way of summing up to 60 values. Without eps a set may happen to deviate little, so sizes
# are large enough for none to be nearly constant.
RTOL = 2 * C * 2 * 6 * EPS64


def same(actual: np.ndarray, wanted: np.ndarray, scale: float = 1.0) -> None:
    """Equal, but for rounding of the largest."""
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=RTOL * scale * max(1, np.abs(wanted).max(initial=0)))


@st.composite
def examples(draw_value: Any, ops: list[str], *, min_n: int = 4) -> Example:
    """An op on a shape of 3 or 4 dimensions, with any channel axis and options, and at least `min_n` values a set."""
    op = draw_value(st.sampled_from(ops))
    ndim = draw_value(st.integers(3, 4))
    shape = draw_value(st.lists(st.integers(1, 5), min_size=ndim, max_size=ndim).map(tuple))
    shape = (*shape[:-1], draw_value(st.integers(min_n, min_n + 3)))
    if op in ("layer_norm", "rms_norm"):
        return Example(op, shape, {"normalized_shape": shape[draw_value(st.integers(1, ndim - 1)) :]})
    # the last dimension, of at least min_n, stays spatial
    axis = draw_value(st.integers(0 if op.startswith("batch") else 1, ndim - 2))
    options: dict[str, Any] = {"axis": axis - draw_value(st.sampled_from([0, ndim]))}
    if op == "group_norm":
        divisors = [g for g in range(1, shape[axis] + 1) if shape[axis] % g == 0]
        options["num_groups"] = draw_value(st.sampled_from(divisors))
    return Example(op, shape, options)


seeds = st.integers(0, 2**32 - 1)


# -- symmetries ------------------------------------------------------------------------------------------------


@given(examples(CENTERED), seeds, st.integers(-100, 100), st.sampled_from([-4.0, -1.0, 0.5, 2.0]))
def test_a_shift_of_x_changes_nothing_and_a_scale_only_the_sign(example, seed, shift, scale):
    arrays = draw(example, seed)
    arrays["x"] = np.round(arrays["x"] * 64) / 64  # so that scale * x + shift is exact
    plain = {"x": arrays["x"]}
    wanted = bare(example, plain, eps=1e-5) * np.sign(scale)
    moved = bare(example, {"x": scale * arrays["x"] + shift}, eps=1e-5 * scale**2)
    same(moved, wanted, scale=1 + 2 * abs(shift))


@given(examples(["rms_norm"]), seeds, st.sampled_from([-4.0, 0.5, 2.0, 1024.0]))
def test_a_power_of_two_changes_no_bit_of_an_rms_norm_but_the_sign(example, seed, scale):
    x = draw(example, seed)["x"]
    np.testing.assert_array_equal(
        bare(example, {"x": scale * x}, eps=1e-5 * scale**2), bare(example, {"x": x}, eps=1e-5) * np.sign(scale)
    )


@given(examples(list(GIVEN)), seeds)
def test_the_order_of_the_samples_does_not_matter(example, seed):
    """Where axis 0 holds a batch norm's channels, the parameters are permuted as well."""
    arrays, dy = draw(example, seed), draw_dy(example, seed + 1)
    order = np.random.default_rng(seed).permutation(example.shape[0])
    of_channels = _axis(example) == 0
    permuted = {name: a[order] if of_channels or name in ("x", "addend") else a for name, a in arrays.items()}
    y, cache = forward(example, arrays)
    y_permuted, cache_permuted = forward(example, permuted)
    same(y_permuted, y[order])
    gradients, gradients_permuted = backward(example, dy, cache), backward(example, dy[order], cache_permuted)
    same(gradients_permuted.dx, gradients.dx[order], scale=_gain(arrays, cache))
    wanted = gradients.dweight[order] if of_channels else gradients.dweight
    same(gradients_permuted.dweight, wanted, scale=len(dy.reshape(-1)))


@given(examples(["batch_norm", "instance_norm", "batch_norm_add_relu"]), seeds)
def test_a_channel_never_sees_another(example, seed):
    """Other numbers in channel 0 change no bit of the others."""
    axis = _axis(example)
    arrays, dy = draw(example, seed), draw_dy(example, seed + 1)
    other = arrays | {"x": arrays["x"].copy()}
    np.moveaxis(other["x"], axis, 0)[0] = 1e10
    results = []
    for given_arrays in (arrays, other):
        y, cache = forward(example, given_arrays)
        gradients = backward(example, dy, cache)
        results.append([np.moveaxis(y, axis, 0)[1:], np.moveaxis(gradients.dx, axis, 0)[1:], gradients.dweight[1:]])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@given(examples(["batch_norm", "batch_norm_frozen", "batch_norm_add_relu", "instance_norm", "group_norm"]), seeds)
def test_the_channel_axis_may_be_moved(example, seed):
    arrays, dy = draw(example, seed), draw_dy(example, seed + 1)
    axis, first = example.options["axis"], 1
    moved = {name: np.moveaxis(a, axis, first) if a.ndim > 1 else a for name, a in arrays.items()}
    at_1 = example._replace(options=example.options | {"axis": first})
    y, cache = forward(example, arrays)
    y_moved, cache_moved = forward(at_1, moved)
    same(y_moved, np.moveaxis(y, axis, first))
    gradients = backward(example, dy, cache)
    gradients_moved = backward(at_1, np.moveaxis(dy, axis, first), cache_moved)
    same(gradients_moved.dx, np.moveaxis(gradients.dx, axis, first), scale=_gain(arrays, cache))
    same(gradients_moved.dweight, gradients.dweight, scale=dy.size)


# -- of forward and backward -----------------------------------------------------------------------------------


@given(examples(CENTERED), seeds)
def test_each_set_has_mean_0_and_the_variance_that_eps_leaves(example, seed):
    x = draw(example, seed)["x"]
    sets, sets_of_x = (_sets(example, a) for a in (bare(example, {"x": x}), x))
    var = sets_of_x.var(axis=1)
    same(sets.mean(axis=1), 0 * var)
    same(sets.var(axis=1), var / (var + 1e-5))


@given(examples(NORMS), seeds)
def test_dx_without_eps_is_orthogonal_to_what_normalizing_removes(example, seed):
    """To x_hat, for y does not see its scale, and to constants, for y does not see its shift."""
    arrays, dy = draw(example, seed), draw_dy(example, seed + 1)
    _, cache = forward(example, arrays, eps=0.0)
    dx = _sets(example, backward(example, dy, cache).dx)
    x_hat = _sets(example, bare(example, {"x": arrays["x"]}, eps=0.0))
    gain = _gain(arrays, cache) * np.abs(dy).max() * dx.shape[1] * np.abs(x_hat).max()
    same((dx * x_hat).sum(axis=1), np.zeros(len(dx)), scale=gain)
    if example.op != "rms_norm":
        same(dx.sum(axis=1), np.zeros(len(dx)), scale=gain)


@given(examples(list(GIVEN)), seeds, st.floats(-3, 3))
def test_the_backward_is_linear_in_dy(example, seed, factor):
    arrays = draw(example, seed)
    a, b = draw_dy(example, seed + 1), draw_dy(example, seed + 2)
    _, cache = forward(example, arrays)
    parts = [backward(example, dy, cache) for dy in (a, b, factor * a + b)]
    scale = _gain(arrays, cache) * (1 + abs(factor)) * a.size
    for of_a, of_b, of_sum in zip(*parts, strict=True):
        if of_a is not None:
            same(of_sum, factor * of_a + of_b, scale=scale)


@given(examples(["batch_norm_frozen", *NORMS]), seeds)
def test_dy_meets_y_in_the_parameters_gradients(example, seed):
    """y is linear in weight and bias together, so <dy, y> = <dweight, weight> + <dbias, bias>."""
    arrays, dy = draw(example, seed), draw_dy(example, seed + 1)
    y, cache = forward(example, arrays)
    gradients = backward(example, dy, cache)
    parameters = np.vdot(gradients.dweight, arrays["weight"])
    if "bias" in arrays:
        parameters += np.vdot(gradients.dbias, arrays["bias"])
    same(np.vdot(dy, y), parameters, scale=np.abs(dy).sum() * (1 + np.abs(y).max()))


# -- the norms to each other -----------------------------------------------------------------------------------


def _agree(ours: Example, theirs: Example, arrays: dict[str, np.ndarray], seed: int) -> None:
    """The same y, and dx for the same dy, when x is seen in the other's shape."""
    dy = draw_dy(ours, seed + 1)
    y, cache = forward(ours, arrays)
    other_arrays = {name: a.reshape(theirs.shape) if name == "x" else a for name, a in arrays.items()}
    other_y, other_cache = forward(theirs, other_arrays)
    same(other_y.reshape(y.shape), y)
    dx = backward(ours, dy, cache).dx
    other_dx = backward(theirs, dy.reshape(theirs.shape), other_cache).dx.reshape(dx.shape)
    same(other_dx, dx, scale=_gain(arrays, cache) * 8)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(5, 9))


@given(shapes, seeds)
def test_batch_norm_of_one_sample_is_instance_norm_and_group_norm_of_single_channels(shape, seed):
    one = (1, *shape[1:])
    arrays = draw(Example("batch_norm", one), seed)
    _agree(Example("batch_norm", one), Example("instance_norm", one), arrays, seed)
    _agree(Example("batch_norm", one), Example("group_norm", one, {"num_groups": shape[1]}), arrays, seed)


@given(shapes, seeds)
def test_instance_norm_is_group_norm_of_single_channels(shape, seed):
    arrays = draw(Example("instance_norm", shape), seed)
    _agree(Example("instance_norm", shape), Example("group_norm", shape, {"num_groups": shape[1]}), arrays, seed)


@given(shapes, seeds)
def test_instance_norm_is_batch_norm_with_every_sample_and_channel_a_channel(shape, seed):
    arrays = {"x": draw(Example("instance_norm", shape), seed)["x"]}
    flat = (1, shape[0] * shape[1], shape[2])
    _agree(Example("instance_norm", shape), Example("batch_norm", flat), arrays, seed)


@given(shapes, seeds)
def test_group_norm_of_one_group_is_layer_norm_of_a_sample(shape, seed):
    arrays = {"x": draw(Example("instance_norm", shape), seed)["x"]}
    layer = Example("layer_norm", shape, {"normalized_shape": shape[1:]})
    _agree(Example("group_norm", shape, {"num_groups": 1}), layer, arrays, seed)


@given(shapes, seeds)
def test_layer_norm_is_batch_norm_of_the_transpose(shape, seed):
    rows, k = shape[0] * shape[1], shape[2]
    x, dy = np.random.default_rng(seed).standard_normal((2, rows, k))
    y, cache = an.layer_norm_forward(x, k)
    y_t, cache_t = an.batch_norm_forward(x.T)
    same(y_t.T, y)
    dx = an.layer_norm_backward(dy, cache).dx
    same(an.batch_norm_backward(dy.T, cache_t).dx.T, dx, scale=cache.rstd.max() * 8)


@given(shapes, seeds)
def test_rms_norm_of_a_row_and_its_negative_is_their_layer_norm(shape, seed):
    """Such rows have mean 0."""
    half = np.random.default_rng(seed).standard_normal((shape[0], shape[2]))
    x = np.concatenate((half, -half), axis=1)
    same(an.rms_norm(x, x.shape[1], eps=1e-5), an.layer_norm(x, x.shape[1], eps=1e-5))


@given(examples(["batch_norm"]), seeds)
def test_batch_norm_is_frozen_batch_norm_with_the_statistics_of_the_batch(example, seed):
    arrays = draw(example, seed)
    y, cache = forward(example, arrays)
    frozen = example._replace(op="batch_norm_frozen")
    np.testing.assert_array_equal(bare(frozen, arrays | {"mean": cache.mean, "var": cache.var}), y)


# -- of the drawn ----------------------------------------------------------------------------------------------


def _axis(example: Example) -> int | None:
    """The channel axis, counted from the front."""
    axis = example.options.get("axis")
    return None if axis is None else axis % len(example.shape)


def _gain(arrays: dict[str, np.ndarray], cache: Any) -> float:
    """What a dy of 1 may become at most: weight * rstd, times x_hat, which is about 3 at most."""
    return float(3 * max(1, np.abs(arrays.get("weight", np.ones(1))).max()) * cache.rstd.max())


def _sets(example: Example, array: np.ndarray) -> np.ndarray:
    """(sets, n)"""
    if "normalized_shape" in example.options:
        return array.reshape(-1, math.prod(example.options["normalized_shape"]))
    if example.op == "batch_norm":
        return np.moveaxis(array, example.options["axis"], 0).reshape(example.shape[_axis(example)], -1)
    groups = example.options.get("num_groups", example.shape[_axis(example)])
    return np.moveaxis(array, example.options["axis"], 1).reshape(example.shape[0] * groups, -1)
