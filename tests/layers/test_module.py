"""Section K of the contract: the tree of modules, its arrays, hooks and state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import FLOATING, FUSED_BATCH_NORMS, Case, draw, filled

pytestmark = pytest.mark.behaviour(46)
CASES = pytest.mark.parametrize("case", FLOATING, ids=str)

METHODS = """__call__ add_module apply buffers children cpu cuda double eval extra_repr float forward half
load_state_dict modules named_buffers named_children named_modules named_parameters parameters register_buffer
register_forward_hook register_forward_pre_hook register_parameter requires_grad_ state_dict to train zero_grad"""


class Scale(an.Module):
    """A user's own layer: y = x * factor + shift."""

    def __init__(self, factor: float = 3.0) -> None:
        super().__init__()
        self.register_parameter("factor", np.asarray(factor))
        self.register_parameter("unused", None)
        self.register_buffer("shift", np.asarray(1.0))
        self.register_buffer("scratch", np.asarray(5.0), persistent=False)

    def forward(self, x: Any) -> Any:
        self.keep(x)
        return x * self.factor + self.shift

    def backward(self, dy: Any) -> Any:
        self.accumulate_gradient("factor", np.asarray(np.sum(dy * self.kept())))
        return dy * self.factor


def tree() -> Any:
    """Sequential(Scale, Sequential(LayerNorm, Scale))."""
    return an.Sequential(Scale(), an.Sequential(an.LayerNorm(3), Scale()))


@CASES
def test_every_layer_has_the_whole_surface(case: Case) -> None:
    layer = case.layer()
    assert [name for name in METHODS.split() if not callable(getattr(layer, name))] == []
    for name in ("reset_parameters", "reset_running_stats")[: 1 + hasattr(layer, "running_mean")]:
        assert callable(getattr(layer, name))


# -- registering -----------------------------------------------------------------------------------------------


def test_registered_arrays_are_attributes_that_can_be_assigned() -> None:
    layer = Scale()
    layer.factor = np.asarray(7.0)
    layer.shift = np.asarray(2.0)
    assert dict(layer.named_parameters()) == {"factor": 7.0}
    assert dict(layer.named_buffers()) == {"shift": 2.0, "scratch": 5.0}
    assert layer.grads == {"factor": None, "unused": None}


def test_a_buffer_that_is_not_persistent_stays_out_of_the_state() -> None:
    layer = Scale()
    assert set(layer.state_dict()) == {"factor", "shift"}
    layer.load_state_dict(layer.state_dict())
    assert list(dict(layer.named_buffers())) == ["shift", "scratch"]


def test_an_assigned_module_is_a_child_and_can_be_replaced_or_deleted() -> None:
    parent, first, second = an.Module(), Scale(), Scale()
    parent.child = first
    parent.add_module("none", None)
    assert dict(parent.named_children()) == {"child": first}
    parent.child = second
    assert list(parent.children()) == [second]
    assert parent.child is second
    del parent.child
    assert list(parent.children()) == []
    with pytest.raises(AttributeError, match="child"):
        _ = parent.child


@pytest.mark.parametrize("name", ["", "a.b", "forward", "factor", "shift", 3])
@pytest.mark.parametrize("method", ["register_parameter", "register_buffer", "add_module"])
def test_a_name_that_is_taken_or_no_name_is_refused(method: str, name: Any) -> None:
    with pytest.raises(ValueError, match=r"a name must be|exists already"):
        getattr(Scale(), method)(name, None)


@pytest.mark.parametrize("value", [3, "layer", an.BatchNorm1d])
def test_a_child_must_be_a_module(value: Any) -> None:
    with pytest.raises(TypeError, match="Module"):
        an.Module().add_module("child", value)
    with pytest.raises(TypeError, match="Module"):
        an.Sequential(value)


def test_an_attribute_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = Scale().nothing
    assert not hasattr(Scale(), "nothing")


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_a_module_without_forward_or_backward_says_so(method: str) -> None:
    with pytest.raises(NotImplementedError, match=method):
        getattr(an.Module(), method)(draw(3))


# -- walking the tree ------------------------------------------------------------------------------------------


def test_modules_come_parents_first_with_their_paths() -> None:
    model = tree()
    assert [path for path, _ in model.named_modules()] == ["", "0", "1", "1.0", "1.1"]
    assert [path for path, _ in model.named_modules("net")] == ["net", "net.0", "net.1", "net.1.0", "net.1.1"]
    assert list(model.modules()) == [model, model[0], model[1], model[1][0], model[1][1]]
    assert [name for name, _ in model.named_children()] == ["0", "1"]
    assert list(model.children()) == [model[0], model[1]]


def test_arrays_come_with_their_paths_and_those_of_none_not_at_all() -> None:
    model = tree()
    names = ["0.factor", "1.0.weight", "1.0.bias", "1.1.factor"]
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_parameters("net")] == [f"net.{name}" for name in names]
    assert [id(array) for array in model.parameters()] == [id(array) for _, array in model.named_parameters()]
    names = ["0.shift", "0.scratch", "1.1.shift", "1.1.scratch"]
    assert [name for name, _ in model.named_buffers()] == names
    assert [name for name, _ in model.named_buffers(prefix="net")] == [f"net.{name}" for name in names]
    assert [id(array) for array in model.buffers()] == [id(array) for _, array in model.named_buffers()]


def test_without_recursion_only_a_modules_own_arrays_come() -> None:
    model = tree()
    assert list(model.named_parameters(recurse=False)) == []
    assert list(model.buffers(recurse=False)) == []
    assert [name for name, _ in model[0].named_buffers("own", recurse=False)] == ["own.shift", "own.scratch"]
    assert len(list(model[0].parameters(recurse=False))) == 1


def test_what_stands_in_two_places_comes_once() -> None:
    layer = Scale()
    model = an.Sequential(layer, layer)
    assert list(model.modules()) == [model, layer]
    assert [name for name, _ in model.named_parameters()] == ["0.factor"]
    assert set(model.state_dict()) == {"0.factor", "0.shift", "1.factor", "1.shift"}  # as torch's


def test_apply_visits_children_before_their_parents() -> None:
    model, seen = tree(), []
    assert model.apply(seen.append) is model
    assert seen == [model[0], model[1][0], model[1][1], model[1], model]


@pytest.mark.parametrize("mode", [True, False])
def test_train_and_eval_reach_the_whole_tree(mode: bool) -> None:
    model = tree()
    assert model.train(not mode).train(mode) is model
    assert [module.training for module in model.modules()] == [mode] * 5
    assert [module.training for module in model.train().eval().modules()] == [False] * 5
    assert model.train().training is True
    with pytest.raises(ValueError, match="mode"):
        model.train(1)


# -- Sequential ------------------------------------------------------------------------------------------------


def test_sequential_takes_modules_or_one_mapping_of_names() -> None:
    first, second = Scale(2.0), Scale(5.0)
    for model, names in (
        (an.Sequential(first, second), ["0", "1"]),
        (an.Sequential({"a": first, "b": second}), ["a", "b"]),
    ):
        assert [name for name, _ in model.named_children()] == names
        assert (len(model), list(model), model[1], model[-1]) == (2, [first, second], second, second)
    assert an.Sequential({"a": first}).a is first
    assert len(an.Sequential()) == 0


@pytest.mark.parametrize("case", FUSED_BATCH_NORMS, ids=str)
def test_sequential_runs_forward_in_order_and_backward_in_reverse(case: Case) -> None:
    layers = [case.layer(), Scale(2.0), case.layer()]
    x = y = case.x()
    for layer in layers:
        y = layer(y)
    dx = case.x(1)
    for layer in reversed(layers):
        dx = layer.backward(dx)
        dx = dx.dx if isinstance(dx, tuple) else dx  # a fused layer
    model = an.Sequential(case.layer(), Scale(2.0), case.layer())
    np.testing.assert_array_equal(model(x), y)
    np.testing.assert_array_equal(model.backward(case.x(1)), dx)


# -- hooks -----------------------------------------------------------------------------------------------------


def test_hooks_run_around_forward_in_the_order_of_their_registration() -> None:
    layer, seen = Scale(), []
    layer.register_forward_hook(lambda module, args, y: seen.append(("after", module, args, y)))
    layer.register_forward_pre_hook(lambda module, args: seen.append(("first", module, args)))
    layer.register_forward_pre_hook(lambda module, args: seen.append(("second", module, args)))
    assert layer(2.0) == 7.0
    assert seen == [("first", layer, (2.0,)), ("second", layer, (2.0,)), ("after", layer, (2.0,), 7.0)]


def test_what_a_hook_returns_replaces_arguments_or_output() -> None:
    layer = Scale()
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    layer.register_forward_pre_hook(lambda module, args: args[0] * 10)  # a single argument needs no tuple
    layer.register_forward_hook(lambda module, args, y: -y)
    assert layer(2.0) == -91.0


def test_a_removed_hook_runs_no_more() -> None:
    layer, seen = Scale(), []
    kept = layer.register_forward_hook(lambda *args: seen.append("kept"))
    handles = [layer.register_forward_hook(lambda *args: seen.append("removed"))]
    handles.append(layer.register_forward_pre_hook(lambda *args: seen.append("removed")))
    for handle in handles:
        handle.remove()
        handle.remove()  # twice is once
    layer(2.0)
    assert seen == ["kept"]
    assert kept is not None


# -- state -----------------------------------------------------------------------------------------------------


def test_load_state_dict_without_strict_passes_over_missing_and_unexpected_keys() -> None:
    model, state = filled(tree()), dict(filled(tree(), seed=9).state_dict())
    weight = model[1][0].weight.copy()
    state["0.factor"] = np.asarray(8.0)
    state["extra"] = state.pop("1.0.weight")
    result = model.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["1.0.weight"], ["extra"])
    assert model[0].factor == 8.0
    np.testing.assert_array_equal(model[1][0].weight, weight)


@pytest.mark.parametrize("state", [None, [("factor", 1)], 3])
def test_load_state_dict_takes_a_mapping(state: Any) -> None:
    with pytest.raises(TypeError, match="mapping"):
        Scale().load_state_dict(state)


def test_extra_repr_of_a_users_own_layer_stands_in_the_repr() -> None:
    class Named(Scale):
        def extra_repr(self) -> str:
            return "by name"

    assert repr(Named()) == "Named(by name)"
    assert repr(an.Sequential(Named())) == "Sequential(\n  (0): Named(by name)\n)"
