"""Public calls that are answered in one step: the bits of those taken step by step, in every field; and when they are.

`Kernel.direct` is replaced here: by nothing, and by itself with a record of what it answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import _kernel, cpu, only
from arraynorm.kernels.reference import (
    batch_norm,
    batch_norm_add_relu,
    group_norm,
    instance_norm,
    layer_norm,
    quantized_batch_norm,
    rms_norm,
)
from compiled import needs_native

pytestmark = needs_native
ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
SHAPE = (4, 6, 5, 3)

Arrays = dict[str, Any]
Call = Callable[[Arrays], Any]


def batch_backward(a: Arrays, **options: Any) -> Any:
    return an.batch_norm_backward(a["dy"], an.batch_norm_forward(a["x"], a["weight"], a["bias"], **options)[1])


def add_relu_backward(a: Arrays, **options: Any) -> Any:
    _, cache = an.batch_norm_add_relu_forward(a["x"], a["addend"], a["weight"], a["bias"], **options)
    return an.batch_norm_add_relu_backward(a["dy"], cache)


def frozen_backward(a: Arrays) -> Any:
    _, cache = an.batch_norm_frozen_forward(a["x"], a["mean"], a["var"], a["weight"], a["bias"])
    return an.batch_norm_frozen_backward(a["dy"], cache)


def add_relu_frozen_backward(a: Arrays, with_addend: bool = True) -> Any:
    given = (a["mean"], a["var"], a["weight"], a["bias"])
    _, cache = an.batch_norm_add_relu_frozen_forward(a["x"], a["addend"] if with_addend else None, *given)
    return an.batch_norm_add_relu_frozen_backward(a["dy"], cache)


CALLS: dict[str, tuple[Any, Call]] = {
    "batch_norm_forward": (
        batch_norm.batch_norm_forward,
        lambda a: an.batch_norm_forward(a["x"], a["weight"], a["bias"]),
    ),
    "batch_norm_backward": (batch_norm.batch_norm_backward, batch_backward),
    "batch_norm_frozen_forward": (
        batch_norm.batch_norm_apply,
        lambda a: an.batch_norm_frozen_forward(a["x"], a["mean"], a["var"], a["weight"], a["bias"]),
    ),
    "batch_norm_frozen_forward, eps = 0": (
        batch_norm.batch_norm_apply,
        lambda a: an.batch_norm_frozen_forward(a["x"], a["mean"], a["var"], a["weight"], eps=0.0),
    ),
    "batch_norm_frozen_backward": (batch_norm.batch_norm_frozen_backward_apply, frozen_backward),
    "batch_norm_add_relu_frozen_backward": (
        batch_norm_add_relu.batch_norm_add_relu_frozen_backward_apply,
        add_relu_frozen_backward,
    ),
    "batch_norm_add_relu_frozen_backward, no addend": (
        batch_norm_add_relu.batch_norm_add_relu_frozen_backward_apply,
        lambda a: add_relu_frozen_backward(a, with_addend=False),
    ),
    "batch_norm_add_relu_forward": (
        batch_norm_add_relu.batch_norm_add_relu_forward,
        lambda a: an.batch_norm_add_relu_forward(a["x"], a["addend"], a["weight"], a["bias"]),
    ),
    "batch_norm_add_relu_forward, no addend": (
        batch_norm_add_relu.batch_norm_add_relu_forward,
        lambda a: an.batch_norm_add_relu_forward(a["x"]),
    ),
    "batch_norm_add_relu_backward": (batch_norm_add_relu.batch_norm_add_relu_backward, add_relu_backward),
    "batch_norm_add_relu_frozen_forward": (
        batch_norm_add_relu.batch_norm_add_relu_apply,
        lambda a: an.batch_norm_add_relu_frozen_forward(a["x"], a["addend"], a["mean"], a["var"], a["weight"]),
    ),
    "group_norm_forward": (
        group_norm.group_norm_forward,
        lambda a: an.group_norm_forward(a["x"], 3, a["weight"], a["bias"]),
    ),
    "group_norm_backward": (
        group_norm.group_norm_backward,
        lambda a: an.group_norm_backward(a["dy"], an.group_norm_forward(a["x"], 2, a["weight"], a["bias"])[1]),
    ),
    "instance_norm_forward": (
        instance_norm.instance_norm_forward,
        lambda a: an.instance_norm_forward(a["x"], a["weight"], a["bias"]),
    ),
    "instance_norm_backward": (
        instance_norm.instance_norm_backward,
        lambda a: an.instance_norm_backward(a["dy"], an.instance_norm_forward(a["x"], a["weight"], a["bias"])[1]),
    ),
    "layer_norm_forward": (layer_norm.layer_norm_forward, lambda a: an.layer_norm_forward(a["x"], 3)),
    "layer_norm_backward": (
        layer_norm.layer_norm_backward,
        lambda a: an.layer_norm_backward(a["dy"], an.layer_norm_forward(a["x"], (5, 3))[1]),
    ),
    "rms_norm_forward": (rms_norm.rms_norm_forward, lambda a: an.rms_norm_forward(a["x"], 3)),
    "rms_norm_backward": (
        rms_norm.rms_norm_backward,
        lambda a: an.rms_norm_backward(a["dy"], an.rms_norm_forward(a["x"], (5, 3))[1]),
    ),
}
QUANTIZED = {
    "quantized_batch_norm": quantized_batch_norm.quantized_batch_norm,
    "quantized_batch_norm_relu": quantized_batch_norm.quantized_batch_norm_relu,
}
OF_CHANNELS = [name for name in CALLS if not name.startswith(("layer", "rms"))]


@contextmanager
def answered(kernel: Any) -> Iterator[list[bool]]:
    """Whether each call of the kernel's direct function was answered."""
    direct, record = kernel.direct, []

    def recorded(*arguments: object) -> Any:
        made = direct(*arguments)
        record.append(made is not None)
        return made

    kernel.direct = recorded
    try:
        yield record
    finally:
        kernel.direct = direct


@contextmanager
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for kernel in (*(kernel for kernel, _ in CALLS.values()), *QUANTIZED.values()):
            patch.setattr(kernel, "direct", lambda *_: None)
        yield


def arrays(dtype: Any, parameter_dtype: Any = np.float32, **replaced: Any) -> Arrays:
    rng = np.random.default_rng(7)
    x, dy, addend = (rng.standard_normal(SHAPE).astype(dtype) for _ in range(3))
    weight, bias, mean = (rng.standard_normal(SHAPE[1]).astype(parameter_dtype) for _ in range(3))
    var = rng.uniform(0, 2, SHAPE[1]).astype(parameter_dtype)
    var[2] = 0
    return {"x": x, "dy": dy, "addend": addend, "weight": weight, "bias": bias, "mean": mean, "var": var} | replaced


def parts(result: Any) -> Iterator[Any]:
    if isinstance(result, tuple):
        yield type(result)
        for part in result:
            yield from parts(part)
    else:
        yield result


def without_nan(array: Any) -> tuple[Any, Any]:
    """Where an array is NaN, and the rest of it: of a NaN the bits mean nothing."""
    is_nan = array != array
    return is_nan, np.where(is_nan, np.zeros_like(array), array)


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(parts(one), parts(other), strict=True):
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert [plain.tobytes() for plain in without_nan(a)] == [plain.tobytes() for plain in without_nan(b)]
        else:
            assert a is b or a == b


@pytest.mark.parametrize("parameter_dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_one_step_gives_the_bits_of_several(
    name: str, dtype: Any, parameter_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, call = CALLS[name]
    a = arrays(dtype, parameter_dtype)
    with answered(kernel) as record:
        result = call(a)
    assert record == [True]
    with step_by_step(monkeypatch):
        assert_same(result, call(a))


@pytest.mark.parametrize("name", CALLS)
def test_none_is_answered_where_the_reference_alone_may_run(name: str) -> None:
    kernel, call = CALLS[name]
    with only("specialised"), answered(kernel) as record:
        call(arrays(np.float32))
    with only("".join(["refer", "ence"])), answered(kernel) as other:  # not the interned string
        call(arrays(np.float32))
    assert record + other == [True, False]


def test_the_paths_are_a_context_variables() -> None:
    with pytest.raises(TypeError, match="set_allowed_paths: must be a ContextVar, got 'any'"):
        cpu.native.set_allowed_paths("any")


@pytest.mark.parametrize("default", [{}, {"default": None}, {"default": b"reference"}])
def test_a_variable_that_names_no_paths_restricts_nothing(default: dict[str, Any]) -> None:
    kernel, call = CALLS["layer_norm_forward"]
    cpu.native.set_allowed_paths(ContextVar("paths", **default))
    try:
        with answered(kernel) as record:
            call(arrays(np.float32))
    finally:
        cpu.native.set_allowed_paths(_kernel.allowed_paths)
    assert record == [True]


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_any_channel_axis(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    x, addend = (rng.standard_normal(SHAPE, np.float32) for _ in range(2))
    mean, var = rng.standard_normal(SHAPE[axis]), rng.uniform(1, 2, SHAPE[axis])
    with answered(batch_norm.batch_norm_apply) as record:
        frozen = an.batch_norm_frozen_forward(x, mean, var, axis=axis)
    with answered(batch_norm_add_relu.batch_norm_add_relu_forward) as other:
        added = an.batch_norm_add_relu_forward(x, addend, axis=axis)
    assert record + other == [True, True]
    with step_by_step(monkeypatch):
        assert_same(frozen, an.batch_norm_frozen_forward(x, mean, var, axis=axis))
        assert_same(added, an.batch_norm_add_relu_forward(x, addend, axis=axis))


@pytest.mark.parametrize("shape", [(2, 4), (1, 4, 5), (2, 4, 3), (9, 4, 3), (2, 4, 5, 7), (70, 4, 8, 8)])
def test_groups_of_every_walk(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    weight, bias = rng.standard_normal(4), rng.standard_normal(4)

    def results() -> Iterator[Any]:
        y, cache = an.group_norm_forward(x, 2, weight, bias)
        yield y, cache, an.group_norm_backward(dy, cache)
        if len(shape) > 2:
            y, other = an.instance_norm_forward(x, weight, bias, axis=1 - len(shape))
            yield y, other, an.instance_norm_backward(dy, other)

    with answered(group_norm.group_norm_forward) as record, answered(group_norm.group_norm_backward) as other:
        found = list(results())
    assert record + other == [True, True]
    with step_by_step(monkeypatch):
        for one, several in zip(found, results(), strict=True):
            assert_same(one, several)


def test_one_value_per_channel_is_enough_for_given_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mean, var = np.ones((1, 3), np.float32), np.zeros(3), np.ones(3)
    with answered(batch_norm.batch_norm_apply) as record:
        result = an.batch_norm_frozen_forward(x, mean, var)
    assert record == [True]
    with step_by_step(monkeypatch):
        assert_same(result, an.batch_norm_frozen_forward(x, mean, var))


@pytest.mark.parametrize("name", ["batch_norm_frozen_forward", "batch_norm_add_relu_frozen_forward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_negative_variance(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[name][1]
    a = arrays(dtype, var=np.array([1, -1, 2, 0, 1, 1.0]))
    result = call(a)
    assert np.isnan(np.asarray(result[0][:, 1], np.float64)).all() or "relu" in name
    with step_by_step(monkeypatch):
        assert_same(result, call(a))


WRONG: dict[str, Arrays] = {
    "another shape of the statistics": {"mean": np.zeros(5), "var": np.ones(5), "weight": np.ones(5), "dy": np.ones(3)},
    "integers": {"mean": np.zeros(6, int), "x": np.zeros(SHAPE, int)},
    "masked": {"x": np.ma.zeros(SHAPE), "var": np.ma.ones(6)},
    "a list": {"x": [[1.0, 2.0]], "addend": [1.0]},
    "another shape of the addend": {"addend": np.ones((4, 6, 5, 2)), "dy": np.ones((4, 6, 5, 2)), "bias": np.ones(1)},
    "nothing": {"mean": None, "var": None, "addend": 0.0, "dy": None, "weight": 1.0},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", OF_CHANNELS)
def test_what_is_wrong_is_refused_in_the_same_words(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[name][1]
    for key, value in WRONG[wrong].items():
        a = arrays(np.float32, **{key: value})
        with step_by_step(monkeypatch):
            expected = _outcome(call, a)
        found = _outcome(call, a)
        assert type(found) is type(expected)
        if isinstance(expected, Exception):
            assert str(found) == str(expected)
        else:
            assert_same(found, expected)  # an argument that this call does not have


def _outcome(call: Call, a: Arrays) -> Any:
    try:
        return call(a)
    except (TypeError, ValueError) as error:
        return error


@pytest.mark.parametrize(
    "x",
    [
        np.ones(SHAPE, np.float32)[:, ::2],
        np.ones(SHAPE, np.float32).transpose(0, 3, 1, 2),
        np.ones((0, 6), np.float32),
    ],
    ids=["strided", "permuted", "empty"],
)
def test_what_is_not_plain_is_taken_step_by_step(x: Any) -> None:
    c = x.shape[1]
    with answered(batch_norm.batch_norm_apply) as record:
        an.batch_norm_frozen(x, np.zeros(c), np.ones(c))
    with answered(batch_norm_add_relu.batch_norm_add_relu_forward) as other:
        if x.size:
            an.batch_norm_add_relu(x, x)
    assert not any(record + other)


def test_out_is_written_to_or_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    a = arrays(np.float32)
    out = np.empty_like(a["x"])
    y = an.batch_norm_frozen(a["x"], a["mean"], a["var"], out=out)
    assert y is out
    in_place = a["x"].copy()
    assert an.batch_norm_frozen(in_place, a["mean"], a["var"], out=in_place) is in_place
    assert in_place.tobytes() == out.tobytes()
    block = np.arange(256, dtype=np.float32)
    before = block.copy()
    x, mean = block[:180].reshape(5, 6, 6), block[20:26]
    with pytest.raises(ValueError, match="out"):
        an.batch_norm_frozen_forward(x, mean, np.ones(6), out=x)
    with pytest.raises(ValueError, match="out"):
        an.batch_norm_frozen(block[60:240].reshape(5, 6, 6), block[70:76], np.ones(6), out=block[:180].reshape(5, 6, 6))
    assert block.tobytes() == before.tobytes()


def quantized(name: str, dtype: Any = np.uint8, parameter_dtype: Any = np.float32, **replaced: Any) -> Any:
    a = arrays(np.float32, parameter_dtype)
    xq = np.random.default_rng(2).integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, SHAPE).astype(dtype)
    options = {"x_scale": 0.02, "x_zero_point": 3, "y_scale": 0.05, "y_zero_point": 100, "eps": 1e-3}
    given = {"xq": xq, **{key: a[key] for key in ("mean", "var", "weight", "bias")}} | options | replaced
    return getattr(an, name)(**given)


@pytest.mark.parametrize("parameter_dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_one_step_gives_the_levels_of_several(
    name: str, dtype: Any, parameter_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = np.empty(SHAPE, dtype)
    ways: list[Arrays] = [
        {},
        {"weight": None, "bias": None},
        {"out": out},
        {"x_zero_point": int(np.iinfo(dtype).min)},
    ]
    for options in ways:
        with answered(QUANTIZED[name]) as record:
            result = quantized(name, dtype, parameter_dtype, **options)
        assert record == [True]
        assert (result is out) == ("out" in options)
        kept = result.copy()
        with step_by_step(monkeypatch):
            assert_same(kept, quantized(name, dtype, parameter_dtype, **options))


def test_quantized_in_place_and_along_another_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    xq = np.arange(120, dtype=np.uint8).reshape(4, 5, 6)
    options: Arrays = {"axis": -1, "xq": xq}
    wanted = quantized("quantized_batch_norm", **options)
    with step_by_step(monkeypatch):
        assert_same(wanted, quantized("quantized_batch_norm", **options))
    with answered(quantized_batch_norm.quantized_batch_norm) as record:
        assert quantized("quantized_batch_norm", **options, out=xq) is xq
    assert record == [True]
    assert_same(xq, wanted)


QUANTIZED_WRONG: dict[str, Arrays] = {
    "floats": {"xq": np.zeros(SHAPE, np.float32)},
    "a scale of zero": {"x_scale": 0.0},
    "a scale that is no number": {"y_scale": float("nan")},
    "a zero point out of range": {"x_zero_point": 256},
    "a negative zero point": {"y_zero_point": -1},
    "a zero point that is a float": {"y_zero_point": 1.0},
    "a negative variance": {"var": np.array([1, -1, 2, 0, 1, 1.0])},
    "an infinite weight": {"weight": np.array([1, np.inf, 2, 0, 1, 1.0])},
    "an infinite variance": {"var": np.array([1, np.inf, 2, 0, 1, 1.0])},
    "no mean": {"mean": None},
    "another shape": {"bias": np.ones(5)},
    "no such axis": {"axis": 4},
    "read-only": {"out": np.broadcast_to(np.zeros((), np.uint8), SHAPE)},
    "another dtype of out": {"out": np.zeros(SHAPE, np.int8)},
    "overlapping": {"xq": np.arange(480, dtype=np.uint8)[:360].reshape(SHAPE)},
}


@pytest.mark.parametrize("wrong", QUANTIZED_WRONG)
def test_quantized_what_is_wrong_is_refused_in_the_same_words(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = dict(QUANTIZED_WRONG[wrong])
    if wrong == "overlapping":
        replaced["out"] = replaced["xq"].base[9:369].reshape(SHAPE)

    def call(a: Arrays) -> Any:
        return quantized("quantized_batch_norm", **a)

    with step_by_step(monkeypatch):
        expected = _outcome(call, replaced)
    assert isinstance(expected, Exception)
    found = _outcome(call, replaced)
    assert (type(found), str(found)) == (type(expected), str(expected))
