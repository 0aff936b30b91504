"""Section K of the contract: caches, gradients, no_grad, and one layer called from many threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import FAMILIES, FLOATING, RUNNING, Case, backward, filled, held, values
from namespaces import Namespace, to_numpy

pytestmark = pytest.mark.behaviour(46)
CASES = pytest.mark.parametrize("case", FLOATING, ids=str)
NO_CACHE = pytest.raises(RuntimeError, match="backward needs a forward before it")


# -- caches ----------------------------------------------------------------------------------------------------


@CASES
def test_backward_uses_up_the_cache_of_the_last_forward(case: Case) -> None:
    layer = case.layer()
    with NO_CACHE:
        layer.backward(case.x(1))
    layer(case.x(5))
    layer(case.x())
    dx = backward(layer, case.x(1))
    after = held(layer)
    with NO_CACHE:
        layer.backward(case.x(1))
    assert held(layer) == after
    other = case.layer()
    other(case.x())
    np.testing.assert_array_equal(dx, backward(other, case.x(1)))


@pytest.mark.parametrize("drop", ["train", "eval", "clear_cache"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_a_change_of_mode_and_clear_cache_drop_the_cache(case: Case, training: bool, drop: str) -> None:
    layer = case.layer().train(training)
    layer(case.x())
    getattr(an.Sequential(layer), drop)()
    with NO_CACHE:
        layer.backward(case.x(1))


@CASES
def test_a_cast_drops_the_cache(case: Case) -> None:
    layer = case.layer()
    layer(case.x())
    layer.double()
    with NO_CACHE:
        layer.backward(case.x(1))


@CASES
def test_a_backward_that_fails_keeps_cache_and_gradients(case: Case) -> None:
    layer, other = case.layer(), case.layer()
    for each in (layer, other):
        each(case.x())
    before = held(layer)
    with pytest.raises(ValueError, match="dy"):
        layer.backward(case.x(1)[..., :1])
    assert held(layer) == before
    np.testing.assert_array_equal(backward(layer, case.x(1)), backward(other, case.x(1)))


# -- gradients -------------------------------------------------------------------------------------------------


@CASES
def test_gradients_are_none_then_add_up_until_they_are_zeroed(case: Case, xp: Namespace) -> None:
    options = {"xp": xp.module, "dtype": xp.dtype("float64")}
    first, second, both = (case.layer(**options).eval() for _ in range(3))
    names = [name for name, _ in both.named_parameters()]
    assert [both.grads[name] for name in names] == [None] * len(names)
    for seed, layer in ((0, first), (1, second)):
        for each in (layer, both):
            each(case.x(seed, "float64", xp))
            each.backward(case.x(seed + 10, "float64", xp))
    for name in names:
        total = to_numpy(first.grads[name]) + to_numpy(second.grads[name])
        np.testing.assert_array_equal(to_numpy(both.grads[name]), total)


@CASES
def test_zero_grad_forgets_the_gradients_of_the_tree_or_fills_them_with_zeros(case: Case) -> None:
    layer = case.layer()
    model = an.Sequential(an.Sequential(layer))
    for _ in range(2):
        layer(case.x())
        layer.backward(case.x(1))
    held_before = [gradient for gradient in layer.grads.values() if gradient is not None]
    model.zero_grad(set_to_none=False)
    assert [g for g in layer.grads.values() if g is not None] != []
    for gradient in held_before:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))
    model.zero_grad()
    assert set(layer.grads.values()) == {None}


@CASES
def test_without_requires_grad_gradients_stay_none_and_dx_is_the_same(case: Case) -> None:
    layer, other = case.layer(), case.layer()
    model = an.Sequential(layer)
    assert model.requires_grad_(False) is model
    for each in (layer, other):
        each(case.x())
    np.testing.assert_array_equal(backward(layer, case.x(1)), backward(other, case.x(1)))
    assert set(layer.grads.values()) == {None}
    model.requires_grad_()
    layer(case.x())
    layer.backward(case.x(1))
    assert list(model.named_gradients()) != []


def test_named_gradients_are_what_an_optimizer_loops_over() -> None:
    model = filled(an.Sequential(an.LayerNorm(3), an.Sequential(an.BatchNorm1d(3, bias=False))))
    assert list(model.named_gradients()) == []
    x, dy = np.eye(4, 3, dtype=np.float32), np.ones((4, 3), np.float32)
    model(x)
    model.backward(dy * x)
    names = ["0.weight", "0.bias", "1.0.weight"]
    assert [name for name, _, _ in model.named_gradients()] == names
    assert [item.name for item in model.named_gradients("net")] == [f"net.{name}" for name in names]
    assert list(model.named_gradients(recurse=False)) == []
    expected = [to_numpy(p) - 0.5 * g for _, p, g in model.named_gradients()]
    for _, parameter, gradient in model.named_gradients():
        parameter -= 0.5 * gradient
    for array, value in zip(model.parameters(), expected, strict=True):
        np.testing.assert_array_equal(array, value.astype(np.float32))


# -- no_grad ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@CASES
def test_under_no_grad_the_result_is_the_same_and_there_is_no_cache(case: Case, training: bool) -> None:
    layer, other = (case.layer().train(training) for _ in range(2))
    with an.no_grad():
        y = layer(case.x())
    np.testing.assert_array_equal(y, other(case.x()))
    assert held(layer) == held(other)
    with NO_CACHE:
        layer.backward(case.x(1))


def test_no_grad_nests_and_ends_after_an_exception() -> None:
    case = RUNNING[1]
    layer = case.layer()
    with an.no_grad():
        with an.no_grad():
            pass
        layer(case.x())
    with NO_CACHE:
        layer.backward(case.x(1))
    with pytest.raises(KeyError), an.no_grad():
        raise KeyError
    layer(case.x())
    layer.backward(case.x(1))


def test_no_grad_is_a_setting_of_one_thread() -> None:
    case = RUNNING[1]
    layer, inside, done = case.layer(), threading.Event(), threading.Event()

    def elsewhere() -> None:
        with an.no_grad():
            inside.set()
            done.wait(10)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(elsewhere)
        assert inside.wait(10)
        layer(case.x())
        layer.backward(case.x(1))
        done.set()
        future.result()


class Sealed(dict[str, Any]):
    """The attributes of a layer that nobody may write to any more."""

    def __setitem__(self, name: str, value: Any) -> None:
        raise AssertionError(f"{name} was written")

    update = setdefault = pop = __delitem__ = __setitem__  # type: ignore[assignment]


def sealed(layer: Any) -> Any:
    """`layer` with read-only arrays, read-only stores, and a class that refuses assignment."""
    for array in (*layer.parameters(), *layer.buffers()):
        array.flags.writeable = False
    stores = ("_parameters", "_buffers", "_modules", "grads")
    layer.__dict__.update({store: Sealed(layer.__dict__[store]) for store in stores})

    def refuse(self: Any, name: str, value: Any) -> None:
        raise AssertionError(f"{name} was written")

    layer.__class__ = type(type(layer).__name__, (type(layer),), {"__setattr__": refuse})
    return layer


@CASES
def test_eight_threads_may_call_one_layer_in_eval_under_no_grad(case: Case) -> None:
    expected = [case.layer().eval()(case.x(seed)) for seed in range(8)]
    layer = sealed(case.layer().eval())
    attributes, before, together = dict(layer.__dict__), held(layer), threading.Barrier(8)

    def call(seed: int) -> list[Any]:
        together.wait(10)
        with an.no_grad():
            return [layer(case.x(seed)) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(8)))
    for ys, y in zip(results, expected, strict=True):
        for each in ys:
            np.testing.assert_array_equal(each, y)
    assert layer.__dict__ == attributes
    assert held(layer) == before


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@CASES
def test_a_call_never_writes_to_its_input(case: Case, training: bool) -> None:
    layer, x, dy = case.layer().train(training), case.x(), case.x(1)
    y = layer(x)
    backward(layer, dy)
    np.testing.assert_array_equal([x, dy], [case.x(), case.x(1)])
    assert not np.shares_memory(y, x)
    assert not any(np.shares_memory(y, array) for array in values(layer, *layer._parameters))
