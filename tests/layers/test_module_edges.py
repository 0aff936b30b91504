"""What a module does where its parts are shared, removed, restored in another process, or forgotten."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest

import arraynorm as an
from arraynorm.testing import gradcheck


class Scale(an.Module):
    """y = x * weight."""

    def __init__(self, weight):
        super().__init__()
        self.register_parameter("weight", weight)

    def forward(self, x):
        self.keep(x)
        return x * self.weight

    def backward(self, dy):
        self.accumulate_gradient("weight", (dy * self.kept()).sum(axis=0))
        return dy * self.weight


def tied():
    weight = np.asarray([2.0, -3.0])
    return an.Sequential(Scale(weight), Scale(weight))


def test_the_gradients_of_a_tied_parameter_add_up():
    net, x = tied(), np.ones((1, 2))
    weight = net[0].weight
    net.backward(np.ones_like(net(x)))
    steps = {name: gradient for name, _, gradient in net.named_gradients()}
    np.testing.assert_array_equal(sum(steps.values()), 2 * weight[...])  # of x * weight ** 2
    assert all(parameter is weight for _, parameter, _ in net.named_gradients())
    gradcheck(net, inputs=(np.random.default_rng(0).normal(size=(3, 2)),))


@pytest.mark.parametrize("move", [an.Module.half, an.Module.double, lambda net: net.to(np, np.float32)])
def test_a_tied_parameter_stays_tied_when_it_is_converted(move):
    net = move(tied())
    assert net[0].weight is net[1].weight


def test_zeroed_gradients_are_zero_whatever_they_were():
    layer = an.LayerNorm(3)
    layer.grads["weight"] = np.asarray([np.inf, np.nan, 1.0])
    layer.zero_grad(set_to_none=False)
    np.testing.assert_array_equal(layer.grads["weight"], np.zeros(3))


def test_a_hook_survives_the_process_that_unpickles_it_and_adds_another(tmp_path):
    (tmp_path / "hooks.py").write_text("def add_one(module, args, y):\n    return y + 1\n")
    save = "layer = an.LayerNorm(3); layer.register_forward_hook(hooks.add_one); pickle.dump(layer, open('l', 'wb'))"
    load = "layer = pickle.load(open('l', 'rb')); layer.register_forward_hook(hooks.add_one)"
    show = "print(layer(numpy.zeros((1, 3))).tolist())"
    for program in (save, f"{load}; {show}"):
        command = [sys.executable, "-c", f"import pickle, numpy, hooks, arraynorm as an; {program}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "[[2.0, 2.0, 2.0]]\n"


def test_an_accumulated_gradient_is_a_copy():
    layer, gradient = Scale(np.ones(2)), np.ones(2)
    for _ in range(2):
        layer.accumulate_gradient("weight", gradient)
    np.testing.assert_array_equal(layer.grads["weight"], [2, 2])
    np.testing.assert_array_equal(gradient, [1, 1])


def test_a_gradient_that_is_not_the_parameters_is_refused():
    layer = Scale(np.ones(2))
    with pytest.raises(ValueError, match=r"the gradient of weight must have shape \(2,\), got \(4, 2\)"):
        layer.accumulate_gradient("weight", np.ones((4, 2)))
    with pytest.raises(ValueError, match="name must be a parameter's, got 'wieght'"):
        layer.accumulate_gradient("wieght", np.ones(2))
    assert layer.grads == {"weight": None}


def test_a_buffer_registered_anew_is_persistent_again():
    layer = an.Module()
    layer.register_buffer("table", np.ones(2), persistent=False)
    del layer.table
    layer.register_buffer("table", np.ones(2))
    assert list(layer.state_dict()) == ["table"]


def test_a_forgotten_super_init_is_named():
    class Forgetful(an.Module):
        def __init__(self):
            self.norm = an.LayerNorm(3)

    with pytest.raises(AttributeError, match=r"Forgetful: call super\(\).__init__\(\) before anything is assigned"):
        Forgetful()


def test_a_module_that_keeps_itself_in_eval_is_asked():
    class Frozen(an.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    net = an.Sequential(Frozen(3), an.BatchNorm1d(3)).train()
    assert [layer.training for layer in net] == [False, True]


def test_a_child_may_be_none_until_it_is_known():
    class Block(an.Module):
        def __init__(self):
            super().__init__()
            self.down = None
            self.down = an.BatchNorm(3)

    assert "down.weight" in Block().state_dict()


def test_gradients_that_cancel_to_nan_are_no_event():
    layer = Scale(np.ones(2))
    with np.errstate(all="raise"):
        for value in (np.inf, -np.inf):
            layer.accumulate_gradient("weight", np.full(2, value))
    assert np.isnan(layer.grads["weight"]).all()


@pytest.mark.parametrize("cls", [an.BatchNorm, an.InstanceNorm1d])
def test_eval_needs_no_counter(cls):
    layer = cls(3, momentum=None, track_running_stats=True).eval()
    layer.num_batches_tracked = None
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_allclose(layer(x), x / np.sqrt(1 + 1e-5))


def test_the_handle_of_a_hook_removes_it_after_conversion_too():
    layer, calls = an.BatchNorm(3), []
    handle = layer.register_forward_hook(lambda *args: calls.append(args))
    converted = an.SyncBatchNorm.convert_sync_batchnorm(layer, an.distributed.SELF)
    handle.remove()
    converted(np.eye(3))
    an.revert_sync_batchnorm(converted)(np.eye(3))
    assert calls == []


def test_a_training_forward_under_no_grad_is_the_last_one_too():
    layer = an.LayerNorm(3)
    layer(np.eye(3))
    with an.no_grad():
        layer(np.eye(3))
    with pytest.raises(RuntimeError, match="needs a forward before it"):
        layer.backward(np.eye(3))


def test_a_slice_of_a_sequential_is_one_and_shares_its_modules():
    net = an.Sequential(an.LayerNorm(3), an.RMSNorm(3), an.LayerNorm(3))
    part = net[1:]
    assert type(part) is an.Sequential
    assert list(part.named_children()) == [("1", net[1]), ("2", net[2])]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: an.BatchNorm2d(3, axis=4), "axis must be in range for inputs of 4 dimensions, got 4"),
        (lambda: an.InstanceNorm1d(3, axis=0), "axis must not be the sample axis 0, got 0"),
        (lambda: an.InstanceNorm2d(3, axis=-4), "axis must not be the sample axis 0, got -4"),
        (lambda: an.GroupNorm(1, 3, axis=0), "axis must not be the sample axis 0, got 0"),
    ],
)
def test_an_axis_that_no_input_has_is_refused_at_once(build, said):
    with pytest.raises(ValueError, match=said):
        build()


def test_a_shallow_copy_shares_arrays_but_not_what_holds_them():
    layer = an.BatchNorm(3)
    layer.register_forward_hook(lambda module, args, y: y + 1)
    layer(np.eye(3))
    copied = copy.copy(layer)
    assert copied.weight is layer.weight
    copied.weight = np.zeros(3)
    copied.register_forward_hook(lambda module, args, y: y * 0)
    assert layer.weight.all()
    assert layer(np.eye(3)).all()
    with pytest.raises(RuntimeError, match="needs a forward before it"):
        copied.backward(np.eye(3))
