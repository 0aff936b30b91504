"""Running statistics from a cache: an exponential average with the unbiased variance."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
import oracle
from data import hard, spread
from namespaces import DTYPES, numpy_dtype, to_numpy
from norms import Example, draw, each_hard_data, exact, forward, to_library
from tolerances import EPS32, EPS64, C, assert_near, dtype_name, in_float32
from worked_vector import DECIMALS_4, worked_vector

KEEPERS = [
    Example("batch_norm", (3, 5, 11)),
    Example("batch_norm_add_relu", (3, 5, 11)),
    Example("batch_norm", (4, 3, 5), {"axis": -1}),
    Example("instance_norm", (2, 3, 31)),
    Example("instance_norm", (2, 3, 4, 5), {"axis": 2}),
]
each_keeper = pytest.mark.parametrize("example", KEEPERS, ids=str)


def _running(example: Example) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    channels = example.shape[example.options.get("axis", 1)]
    return {"running_mean": rng.standard_normal(channels), "running_var": rng.uniform(0.5, 2, channels)}


def _moved(example: Example, given, running, momentum=0.1):
    return an.update_running_stats(**running, cache=forward(example, given)[1], momentum=momentum)


@pytest.mark.parametrize("example", KEEPERS[::3], ids=str)
@each_hard_data
def test_hard_data_averages_right_to_rounding(xp, dtype, name, example: Example):
    """Buffers are float32 here, or float64 where x is; the variance carries the roundings of its sum."""
    arrays = draw(example)
    sets = exact(example, arrays).sets
    arrays["x"] = spread(hard(name, dtype, *sets.shape), sets, example.shape)
    given = to_library(xp, {"x": arrays["x"]}, dtype)
    buffer_dtype = "float64" if dtype == "float64" or "1e30" in name else "float32"
    running = to_library(xp, _running(example), buffer_dtype)
    host = {key: to_numpy(a) for key, a in running.items()}
    norm = exact(example, {"x": to_numpy(given["x"])})
    wanted = oracle.running_stats(norm, **host, momentum=0.1)
    terms = np.abs(host["running_mean"]) + np.abs(arrays["x"]).max(), oracle.narrow(wanted[1])
    single = EPS32 * in_float32(given["x"])  # of deviations and their squares
    spreads = np.ptp(arrays["x"]), oracle.narrow(wanted[1])
    for key, actual, exactly, scale, of_single in zip(
        running, _moved(example, given, running), wanted, terms, spreads, strict=True
    ):
        bound = C * (EPS64 * np.sqrt(sets.shape[1]) * scale + single * of_single)
        assert_near(key, actual, exactly, buffer_dtype, bound)


@each_keeper
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1 / 3, 1.0])
def test_momentum_weighs_the_new_value(xp, example: Example, momentum):
    given, running = (to_library(xp, arrays, "float64") for arrays in (draw(example), _running(example)))
    moved = [to_numpy(a) for a in _moved(example, given, running, momentum)]
    old = [to_numpy(a) for a in running.values()]
    batch = [to_numpy(a) for a in _moved(example, given, running, 1.0)]
    for now, before, new in zip(moved, old, batch, strict=True):
        np.testing.assert_allclose(now, (1 - momentum) * before + momentum * new, rtol=2**-51)


def test_the_worked_buffers_are_reproduced(xp):
    running = to_library(xp, {"running_mean": np.array([2.0, 2.0]), "running_var": np.ones(2)}, "float32")
    mean, var = _moved(Example("batch_norm", ()), {"x": xp.asarray(worked_vector())}, running)
    np.testing.assert_allclose(to_numpy(mean), [1.8233, 1.8065], rtol=0, atol=DECIMALS_4)
    np.testing.assert_allclose(to_numpy(var), [0.9007, 1.1187], rtol=0, atol=DECIMALS_4)


def test_the_variance_is_unbiased(xp):
    """0 and 2: biased 1, unbiased 2."""
    x, zero = xp.asarray([[0.0], [2.0]], "float64"), xp.asarray([0.0], "float64")
    mean, var = an.update_running_stats(zero, zero, an.batch_norm_forward(x)[1], momentum=1.0)
    assert (float(mean[0]), float(var[0])) == (1, 2)


def test_instance_statistics_are_averaged_over_the_samples(xp):
    """The mean of unbiased variances, 2 and 32, not the variance of all."""
    x, zero = xp.asarray([[[0.0, 2.0]], [[10.0, 18.0]]], "float64"), xp.asarray([0.0], "float64")
    mean, var = an.update_running_stats(zero, zero, an.instance_norm_forward(x)[1], momentum=1.0)
    assert (float(mean[0]), float(var[0])) == (7.5, 17)


@each_keeper
def test_the_arguments_are_not_written_to(example: Example, xp):
    given, running = (to_library(xp, arrays, "float32") for arrays in (draw(example), _running(example)))
    before = [to_numpy(a).copy() for a in running.values()]
    moved = _moved(example, given, running)
    for old, buffer, new in zip(before, running.values(), moved, strict=True):
        np.testing.assert_array_equal(to_numpy(buffer), old)
        assert not np.may_share_memory(to_numpy(new), to_numpy(buffer))


def test_each_buffer_keeps_its_own_dtype():
    example = Example("batch_norm", (3, 5, 11))
    for dtypes in zip(DTYPES, reversed(DTYPES), strict=True):
        running = {
            name: values.astype(numpy_dtype(dtype))
            for (name, values), dtype in zip(_running(example).items(), dtypes, strict=True)
        }
        assert tuple(dtype_name(a) for a in _moved(example, draw(example), running)) == dtypes


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
@pytest.mark.parametrize("op", ["batch_norm", "batch_norm_add_relu", "instance_norm"])
def test_an_empty_batch_moves_nothing(xp, op, shape):
    example = Example(op, shape)
    running = to_library(xp, _running(example), "float32")
    moved = _moved(example, to_library(xp, draw(example), "float32"), running)
    for old, new in zip(running.values(), moved, strict=True):
        np.testing.assert_array_equal(to_numpy(new), to_numpy(old))


def test_a_nan_moves_its_own_channel_alone(xp):
    example = Example("batch_norm", (3, 5, 11))
    arrays = draw(example)
    arrays["x"][1, 2, 3] = np.nan
    for moved in _moved(example, to_library(xp, arrays, "float32"), to_library(xp, _running(example), "float32")):
        np.testing.assert_array_equal(np.isnan(to_numpy(moved)), np.arange(5) == 2)


def test_a_momentum_of_one_over_the_count_is_the_cumulative_mean():
    batches = np.random.default_rng(0).standard_normal((4, 7, 3))
    mean, var = np.full(3, 9.0), np.full(3, 9.0)
    for count, x in enumerate(batches, start=1):
        mean, var = an.update_running_stats(mean, var, an.batch_norm_forward(x)[1], momentum=1 / count)
    np.testing.assert_allclose(mean, batches.mean(axis=(0, 1)), atol=2**-50)
    np.testing.assert_allclose(var, batches.var(axis=1, ddof=1).mean(axis=0), rtol=2**-50)
