"""Section C of the contract: the buffers, which move, count, can be missing or replaced, and are never half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from layer_cases import (
    BATCH_NORMS,
    BATCH_STATISTICS,
    BUFFERS,
    COUNTED,
    FAMILIES,
    FUSED_BATCH_NORMS,
    INSTANCE_NORMS,
    RUNNING,
    SYNC_BATCH_NORMS,
    Case,
    assert_close,
    backward,
    draw,
    filled,
    held,
    values,
)
from mpi.shards import assert_neighbours
from namespaces import Namespace

PLAIN = BATCH_NORMS + SYNC_BATCH_NORMS


# -- 18, 19: momentum and the counter --------------------------------------------------------------------------


@pytest.mark.behaviour(18)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_without_momentum_the_buffers_are_the_cumulative_means_of_the_batches(case: Case, xp: Namespace) -> None:
    layer = case.layer(momentum=None, xp=xp.module, dtype=xp.dtype("float64"))
    newest = case.layer(momentum=1.0, xp=xp.module, dtype=xp.dtype("float64"))
    layer.num_batches_tracked[...] = 0
    seen = []
    for seed in range(5):
        x = case.x(seed, "float64", xp)
        layer(x)
        newest(x)
        seen.append(values(newest, "running_mean", "running_var"))
        assert_close(layer.running_mean, np.mean([mean for mean, _ in seen], axis=0))
        assert_close(layer.running_var, np.mean([var for _, var in seen], axis=0))


@pytest.mark.behaviour(18)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_the_cumulative_mean_goes_on_from_a_counter_that_was_set(case: Case) -> None:
    layer, newest = case.layer(momentum=None, dtype=np.float64), case.layer(momentum=1.0, dtype=np.float64)
    mean, var = values(layer, "running_mean", "running_var")
    layer.num_batches_tracked = np.asarray(7)
    for each in (layer, newest):
        each(case.x(dtype="float64"))
    assert_close(layer.running_mean, (7 * mean + newest.running_mean) / 8)
    assert_close(layer.running_var, (7 * var + newest.running_var) / 8)


@pytest.mark.behaviour(19)
@pytest.mark.parametrize("case", BATCH_STATISTICS, ids=str)
def test_the_counter_counts_training_forwards(case: Case) -> None:
    layer = case.layer()
    counter = layer.num_batches_tracked
    for seed in range(3):
        layer(case.x(seed))
        assert layer.num_batches_tracked == COUNTED + seed + 1
    assert (layer.num_batches_tracked.dtype, layer.num_batches_tracked.shape) == (counter.dtype, ())


Fail = Callable[[Any, np.ndarray[Any, Any]], Any]


def _with(name: str, value: Any) -> Fail:
    def call(layer: Any, x: Any) -> Any:
        setattr(layer, name, value)
        return layer(x)

    return call


LONG_WEIGHT = _with("weight", np.ones(4, np.float32))
FAILING: dict[str, Fail] = {
    "weight of a wrong length": LONG_WEIGHT,
    "weight of integers": _with("weight", np.ones(3, np.int64)),
    "running_var of a wrong length": _with("running_var", np.ones(4, np.float32)),
    "running_var missing": _with("running_var", None),
    "one value per channel": lambda layer, x: layer(draw(1, 3, *[1] * (x.ndim - 2))),
    "channels": lambda layer, x: layer(x[:, :2]),
    "rank": lambda layer, x: layer(x[0, 0, ...]),
    "integers": lambda layer, x: layer(x.astype(np.int64)),
    "addend": lambda layer, x: layer(x, x[:1]),
}


@pytest.mark.behaviour(19)
@pytest.mark.parametrize("fail", FAILING.values(), ids=FAILING.keys())
@pytest.mark.parametrize("case", [case for case in FAMILIES if case in RUNNING], ids=str)
def test_a_call_that_fails_moves_nothing(case: Case, fail: Fail) -> None:
    layer = case.layer()
    buffers = dict(layer._buffers)
    before = values(layer, *BUFFERS)
    try:
        fail(layer, case.x())
    except Exception:  # that and how these calls fail is shown elsewhere
        np.testing.assert_equal(tuple(buffers.values()), before)
        assert layer.num_batches_tracked is buffers["num_batches_tracked"]
    else:
        assert fail is not LONG_WEIGHT


# -- 21, 22: missing and replaced buffers -----------------------------------------------------------------------


@pytest.mark.behaviour(21)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_one_buffer_alone_is_an_error(case: Case, name: str, training: bool) -> None:
    layer = case.layer().train(training)
    setattr(layer, name, None)
    text = r"^running_mean and running_var must either both be None or neither be None$"
    with pytest.raises(ValueError, match=text):
        layer(case.x())


@pytest.mark.behaviour(22)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_replaced_buffers_are_used_and_updated(case: Case) -> None:
    layer, expected = case.layer(), filled(case.layer(), seed=9)
    given = [a.copy() for a in (expected.running_mean, expected.running_var)]
    layer.running_mean, layer.running_var = given
    for array, name in ((layer.weight, "weight"), (layer.bias, "bias")):
        array[...] = getattr(expected, name)
    for training in (True, False):
        np.testing.assert_array_equal(layer.train(training)(case.x()), expected.train(training)(case.x()))
        np.testing.assert_array_equal(given, values(expected, "running_mean", "running_var"))
    assert layer.running_mean is given[0]
    assert layer.running_var is given[1]


@pytest.mark.behaviour(22)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_replaced_buffers_that_are_read_only_are_rebound(case: Case) -> None:
    layer, expected = case.layer(), case.layer()
    for name in BUFFERS:
        getattr(layer, name).flags.writeable = False
    for each in (layer, expected):
        each(case.x())
    assert held(layer) == held(expected)


@pytest.mark.behaviour(22)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_replaced_buffers_of_a_wrong_length_or_dtype_are_refused(case: Case, name: str, training: bool) -> None:
    for wrong, error in (
        (np.ones(4, np.float32), ValueError),
        (np.ones(1, np.float32), ValueError),  # which would broadcast
        (np.ones(3, np.int64), TypeError),
    ):
        layer = case.layer().train(training)
        setattr(layer, name, wrong)
        with pytest.raises(error, match=name.removeprefix("running_")):
            layer(case.x())


@pytest.mark.behaviour(22)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_given_buffers_without_a_counter_are_updated_with_the_momentum(case: Case) -> None:
    layer, expected = case.layer(track_running_stats=False), case.layer()
    layer.track_running_stats = True
    layer.running_mean, layer.running_var = values(expected, "running_mean", "running_var")
    for each in (layer, expected):
        each(case.x())
    np.testing.assert_array_equal(layer.running_mean, expected.running_mean)
    np.testing.assert_array_equal(layer.running_var, expected.running_var)
    assert layer.num_batches_tracked is None


@pytest.mark.behaviour(22)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_a_cumulative_mean_without_a_counter_is_an_error(case: Case) -> None:
    layer = case.layer(momentum=None)
    layer.num_batches_tracked = None
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        layer(case.x())


# -- 23, 24: empty batches and half precision ------------------------------------------------------------------


@pytest.mark.behaviour(23)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("case", BATCH_STATISTICS + INSTANCE_NORMS, ids=str)
def test_an_empty_batch_gives_an_empty_result_and_moves_nothing(case: Case, momentum: float | None) -> None:
    layer, x = case.layer(momentum=momentum), case.x()[:0]
    before = held(layer)
    y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert held(layer) == before
    dx = backward(layer, x)
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(layer.grads["weight"], np.zeros(3))
    np.testing.assert_array_equal(layer.grads["bias"], np.zeros(3))


@pytest.mark.behaviour(23)
@pytest.mark.parametrize("case", [c for c in PLAIN + FUSED_BATCH_NORMS if len(c.shape) > 2], ids=str)
def test_a_batch_without_spatial_elements_is_empty_too(case: Case) -> None:
    layer, x = case.layer(), case.x()[..., :0]
    before = held(layer)
    assert layer(x).shape == x.shape
    assert held(layer) == before


@pytest.mark.behaviour(24)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_half_precision_input_gives_half_precision_output_and_float32_buffers(case: Case, dtype: str) -> None:
    layer, wide = case.layer(), case.layer()
    x = case.x(dtype=dtype)
    x[...] = x * 1000
    y = layer(x)
    assert y.dtype == x.dtype
    expected = wide(x.astype(np.float32))
    np.testing.assert_array_equal(y, expected.astype(x.dtype))
    for name in ("running_mean", "running_var"):
        assert getattr(layer, name).dtype == np.float32
        # the same number or the next: sums start from one of the first values, which a half holds less of
        assert_neighbours(getattr(layer, name), getattr(wide, name))


@pytest.mark.behaviour(24)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_half_never_makes_buffers_half(case: Case) -> None:
    converted, built = case.layer().half(), case.layer(dtype=np.float16)
    for layer in (converted, built):
        assert layer.running_mean.dtype == layer.running_var.dtype == np.float32
        assert layer.num_batches_tracked.dtype == case.layer().num_batches_tracked.dtype
        layer((case.x() * 3000).astype(np.float16))
        assert np.all(layer.running_var > 65504)  # the largest float16
