"""gradcheck(layer, inputs=(x,)): gradients of inputs and parameters, in the layer's mode, leaving no trace in it."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.testing import GradientError, KinkWarning, gradcheck
from namespaces import Namespace

Array = Any
X = np.random.default_rng(0).standard_normal((2, 4, 3, 1))
ADDEND = np.where(X > 0, 20.0, -20.0) + X  # far from the ReLU's kink, since |x_hat| is below sqrt(6)


def two_norms() -> an.Module:
    return an.Sequential(an.BatchNorm2d(4), an.GroupNorm(2, 4))


LAYERS: dict[str, tuple[Any, tuple[Array, ...]]] = {
    "BatchNorm2d": (lambda: an.BatchNorm2d(4), (X,)),
    "BatchNorm2d in eval": (lambda: an.BatchNorm2d(4).eval(), (X,)),
    "BatchNorm2d without tracking": (lambda: an.BatchNorm2d(4, track_running_stats=False), (X,)),
    "BatchNorm2d without affine": (lambda: an.BatchNorm2d(4, affine=False), (X,)),
    "BatchNorm without bias": (lambda: an.BatchNorm(4, bias=False), (X,)),
    "BatchNorm with frozen parameters": (lambda: an.BatchNorm(4).requires_grad_(False), (X,)),
    "SyncBatchNorm": (lambda: an.SyncBatchNorm(4, comm=an.distributed.SELF), (X,)),
    "FusedBatchNorm2d": (lambda: an.FusedBatchNorm2d(4), (X, ADDEND)),
    "FusedBatchNorm2d without addend": (lambda: an.FusedBatchNorm2d(4), (X,)),
    "FusedBatchNorm2d in eval": (lambda: an.FusedBatchNorm2d(4).eval(), (X, ADDEND)),
    "InstanceNorm2d": (lambda: an.InstanceNorm2d(4, affine=True), (X,)),
    "GroupNorm": (lambda: an.GroupNorm(2, 4), (X,)),
    "LayerNorm": (lambda: an.LayerNorm((4, 3, 1)), (X,)),
    "RMSNorm": (lambda: an.RMSNorm((4, 3, 1)), (X,)),
    "Sequential": (two_norms, (X,)),
}


def scaled(dx: Array) -> Array:
    return dx * (1 + 1e-6)


def with_wrong_gradient(layer: an.Module, path: str) -> an.Module:
    """`layer`, where the gradient of one parameter comes out 1e-6 too large."""
    owner_path, _, name = path.rpartition(".")
    owner = dict(layer.named_modules())[owner_path]
    wrapped = type(owner)

    class Wrong(wrapped):  # type: ignore[misc, valid-type]
        def accumulate_gradient(self, parameter: str, gradient: Array | None) -> None:
            super().accumulate_gradient(parameter, scaled(gradient) if parameter == name else gradient)

    owner.__class__ = Wrong
    return layer


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_passes_and_keeps_every_bit(layer: str) -> None:
    make, inputs = LAYERS[layer]
    checked = make()
    before = pickle.dumps(checked)
    gradcheck(checked, inputs=inputs)
    assert pickle.dumps(checked) == before


def test_a_layer_of_any_library_passes(xp: Namespace) -> None:
    gradcheck(an.LayerNorm((3,), xp=xp.module), inputs=(xp.asarray(X[:, :, :, 0]),), mode="directional")


@pytest.mark.parametrize(
    ("layer", "parameter"),
    [
        (layer, path)
        for layer, (make, _) in LAYERS.items()
        for path, _ in make().named_parameters()
        if layer in ("BatchNorm2d", "BatchNorm2d in eval", "FusedBatchNorm2d", "Sequential", "RMSNorm")
    ],
)
def test_a_wrong_gradient_of_a_parameter_is_found_and_named(layer: str, parameter: str) -> None:
    make, inputs = LAYERS[layer]
    with pytest.raises(GradientError, match=rf"the gradient of parameter {parameter} is wrong at \["):
        gradcheck(with_wrong_gradient(make(), parameter), inputs=inputs)


@pytest.mark.parametrize(("wrong", "name"), [(0, "x"), (1, "addend")])
def test_a_wrong_gradient_of_an_input_is_found_and_named(wrong: int, name: str) -> None:
    class Wrong(an.FusedBatchNorm2d):
        def backward(self, dy: Array) -> Any:
            gradients = list(super().backward(dy))
            gradients[wrong] = scaled(gradients[wrong])
            return tuple(gradients)

    with pytest.raises(GradientError, match=rf"the gradient of argument {wrong} \({name}\) is wrong"):
        gradcheck(Wrong(4), inputs=(X, ADDEND))


def test_a_gradient_of_an_input_that_was_not_given_is_found() -> None:
    class Inventive(an.FusedBatchNorm2d):
        def backward(self, dy: Array) -> Any:
            dx, _ = super().backward(dy)
            return dx, dx

    with pytest.raises(GradientError, match="the gradient of an absent argument must be None"):
        gradcheck(Inventive(4), inputs=(X,))


def test_a_forgotten_gradient_is_found() -> None:
    class Forgetful(an.LayerNorm):
        def accumulate_gradient(self, name: str, gradient: Array | None) -> None:
            if name != "bias":
                super().accumulate_gradient(name, gradient)

    with pytest.raises(GradientError, match="the gradient of parameter bias is missing"):
        gradcheck(Forgetful((4, 3, 1)), inputs=(X,))


def test_a_layer_that_writes_to_its_parameters_is_found() -> None:
    class Writing(an.LayerNorm):
        def backward(self, dy: Array) -> Array:
            dx = super().backward(dy)
            self.weight *= 0.5
            return dx

    layer = Writing((4, 3, 1))
    with pytest.raises(GradientError, match="parameter weight was written to"):
        gradcheck(layer, inputs=(X,))
    assert np.array_equal(layer.weight, np.ones((4, 3, 1)))


def test_a_backward_for_the_other_mode_is_found() -> None:
    """Eval that differentiates through statistics it does not use."""

    class Confused(an.BatchNorm2d):
        def backward(self, dy: Array) -> Array:
            dx = super().backward(dy)
            return dx - np.mean(dx, axis=(0, 2, 3), keepdims=True)

    with pytest.raises(GradientError, match="argument 0"):
        gradcheck(Confused(4).eval(), inputs=(X,))


def test_a_pending_backward_and_gradients_survive_and_do_not_count() -> None:
    layer = an.BatchNorm2d(4, dtype=np.float64)
    layer(X)
    layer.backward(X)
    held = layer.grads["weight"]
    values = held.copy()
    layer(X)
    gradcheck(layer, inputs=(X,))
    assert layer.grads["weight"] is held
    assert np.array_equal(held, values)
    layer.backward(X)
    # accumulated by the pending backward alone
    np.testing.assert_array_equal(layer.grads["weight"], 2 * values)
    assert layer.num_batches_tracked == 2


def test_a_module_of_the_users_own_passes() -> None:
    class Scale(an.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("gain", np.array([0.5, -2.0, 1.5], dtype=np.float32))

        def forward(self, left: Array, right: Array) -> Array:
            self.keep((left, right))
            return left * right * self.gain

        def backward(self, dy: Array) -> tuple[Array, Array]:
            left, right = self.kept()
            self.clear_cache()
            self.accumulate_gradient("gain", np.sum(dy * left * right, axis=0))
            return dy * right * self.gain, dy * left * self.gain

    inputs = np.random.default_rng(0).standard_normal((2, 4, 3))
    gradcheck(Scale(), inputs=tuple(inputs))
    with pytest.raises(GradientError, match="gradient of parameter gain is wrong"):
        gradcheck(with_wrong_gradient(Scale(), "gain"), inputs=tuple(inputs))


def test_a_kink_in_a_layer_is_left_out() -> None:
    frozen = an.FusedBatchNorm(4).eval()  # mean 0: x = 0 is at the kink
    x = X.copy()
    x[1, 2, 0, 0] = 0
    with (
        pytest.warns(KinkWarning, match=r"argument 0 \(x\) at \[1, 2, 0, 0\]"),
        pytest.warns(KinkWarning, match="bias"),
    ):
        gradcheck(frozen, inputs=(x,))


def test_a_module_with_a_backward_beside_it_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a Module has a backward of its own; .*gradcheck\(layer, inputs=\(x,\)\)"):
        gradcheck(an.BatchNorm2d(4), (X,))  # type: ignore[arg-type]


def test_inputs_of_a_module_must_be_float64_whatever_its_parameters_are() -> None:
    with pytest.raises(TypeError, match=r"argument 0 \(x\) must be float64, got float32"):
        gradcheck(an.BatchNorm2d(4), inputs=(X.astype(np.float32),))
