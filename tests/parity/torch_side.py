"""Parity cases run by torch; the only module here, beside the live tests, that imports it."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.nn import functional

from parity import cases
from parity.cases import Array, Case, LayerCase, OpCase, QuantizedCase, Results

torch.set_num_threads(1)  # the inputs are tiny, and one thread adds in one order


def version() -> str:
    """What torch's results depend on to the bit: its version and the instructions that its loops are compiled for."""
    return f"{torch.__version__.partition('+')[0]} {torch.backends.cpu.get_cpu_capability()}"


def results(case: Case) -> Results:
    """As `ours.results`, with autograd for the gradients; of an instance norm without the counter.

    Torch never moves that counter (behaviour 41, which `test_departures` looks at).
    """
    if isinstance(case, OpCase):
        return _op(case)
    return _layer(case) if isinstance(case, LayerCase) else {"yq": _quantized(case)}


def tensor(array: Array) -> torch.Tensor:
    """A tensor of its own memory, of the same dtype."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


def array(tensor: torch.Tensor) -> Array:
    """An array of its own memory, of the same dtype."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


# -- functional ops --------------------------------------------------------------------------------------------


def _op(case: OpCase) -> Results:
    given = cases.inputs(case)
    leaves = {key: tensor(getattr(given, key)) for key in cases.parameters(case)}
    leaves["x"] = tensor(given.x[0])
    if given.addend is not None:
        leaves["addend"] = tensor(given.addend[0])
    for leaf in leaves.values():
        leaf.requires_grad_()
    running = {"running_mean": tensor(given.running_mean), "running_var": tensor(given.running_var)}
    y = _forward(case, leaves, running)
    y.backward(tensor(given.dy[0]))
    found = {"y": y} | {f"d{key}": leaf.grad for key, leaf in leaves.items()}
    if "relu" in case.target:
        found["open"] = y[None] > 0
    if case.target in ("batch_norm", "batch_norm_add_relu", "instance_norm"):
        found |= running
    return {key: array(value) for key, value in found.items()}


def _forward(case: OpCase, leaves: dict[str, torch.Tensor], running: dict[str, torch.Tensor]) -> torch.Tensor:
    x, parameters = leaves["x"], {"weight": leaves.get("weight"), "bias": leaves.get("bias")}
    if "bias" in leaves and "weight" not in leaves and not case.target.startswith("batch_norm"):
        # A weight of 1 is exact. With a bias alone torch 2.13 fails: group norm's backward with "tensor does not have
        # a device", layer and instance norm of a half-precision x with a complaint about the bias's dtype.
        parameters["weight"] = torch.ones_like(leaves["bias"])
    options: dict[str, Any] = dict(case.options)
    if case.target == "layer_norm":
        return functional.layer_norm(x, **parameters, **options)
    if case.target == "rms_norm":
        with warnings.catch_warnings():
            # of a half-precision x with a float32 weight it says, once, that it is not fused
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
            return functional.rms_norm(x, weight=leaves.get("weight"), **options)
    axis = options.pop("axis", 1)
    x = x.movedim(axis, 1)
    if case.target == "group_norm":
        y = functional.group_norm(x, **parameters, **options)
    elif case.target == "instance_norm":
        y = functional.instance_norm(x, **running, **parameters, momentum=case.momentum, **options)
    else:
        training = not case.target.endswith("frozen")
        y = functional.batch_norm(x, **running, **parameters, training=training, momentum=case.momentum, **options)
    y = _moved_back(y, case, axis)
    return _add_relu(y, leaves.get("addend")) if "relu" in case.target else y


def _moved_back(y: torch.Tensor, case: Case, axis: int) -> torch.Tensor:
    """y with its channels moved from axis 1 to `axis`.

    If x and the gradient have different layouts, torch 2.13 may read one in that of the other, and gives wrong
    gradients without a word (`test_departures` shows it). Moved back the gradient has x's layout; but instance norm
    makes its x contiguous, and so needs a gradient that is.
    """
    if case.target.lower().startswith("instance"):
        y.register_hook(lambda dy: dy.contiguous())
    return y.movedim(1, axis)


def _add_relu(y: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
    return functional.relu(y if addend is None else y + addend)


# -- layers ----------------------------------------------------------------------------------------------------


class AnyRankBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Torch's batch norm without the check of the rank: what BatchNorm and the fused layers are compared with."""

    def _check_input_dim(self, *_: torch.Tensor) -> None:
        pass


def _layer(case: LayerCase) -> Results:
    layer, given, y_open = build(case), cases.inputs(case), []
    axis = dict(case.options).get("axis", 1)
    for step, mode in enumerate(case.modes):
        layer.train(mode == "t")
        x = tensor(given.x[step]).requires_grad_()
        addend = None if given.addend is None else tensor(given.addend[step]).requires_grad_()
        y = layer(x) if axis == 1 else _moved_back(layer(x.movedim(axis, 1)), case, axis)
        if case.target.startswith("Fused"):
            y = _add_relu(y, addend)
        y.backward(tensor(given.dy[step]))
        y_open.append(y > 0)
    found = {"y": y, "dx": x.grad, "daddend": None if addend is None else addend.grad}
    if case.target.startswith("Fused"):
        found["open"] = torch.stack(y_open)
    found |= {f"d{key}": parameter.grad for key, parameter in layer.named_parameters()}
    found |= dict(layer.named_buffers())
    if case.target.startswith("InstanceNorm"):
        found.pop("num_batches_tracked", None)
    return {key: array(value) for key, value in found.items() if value is not None}


def build(case: LayerCase) -> Any:
    """The layer of a case, with the case's numbers in its state."""
    is_ours_alone = case.target == "BatchNorm" or case.target.startswith("Fused")
    kind = AnyRankBatchNorm if is_ours_alone else getattr(torch.nn, case.target)
    options = {key: value for key, value in case.options if key != "axis"}
    layer = kind(**options, dtype=getattr(torch, case.dtype))
    layer.load_state_dict({key: tensor(value) for key, value in cases.state(case).items()})
    for attribute, value in case.changed:
        setattr(layer, attribute, value)
    return layer


# -- quantized -------------------------------------------------------------------------------------------------


def quantize(levels: Array, scale: float, zero_point: int) -> torch.Tensor:
    """A quantized tensor that holds exactly these levels."""
    with warnings.catch_warnings():
        # torch 2.13 deprecates its quantized tensors, which are what is compared here
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        return torch._make_per_tensor_quantized_tensor(tensor(levels), scale, zero_point)


def quantized_layer(target: str, channels: int) -> Any:
    """Torch's layer of our name: its BatchNorm2d and BNReLU2d of torch.ao, and the 3-D ones."""
    from torch.ao.nn import quantized
    from torch.ao.nn.intrinsic import quantized as fused

    name = target.removeprefix("Quantized")
    return getattr(fused if "ReLU" in name else quantized, name)(channels)


def _quantized(case: QuantizedCase) -> Array:
    given, (x_scale, y_scale) = cases.quantized_inputs(case), case.scales
    xq = quantize(given.xq, x_scale, given.x_zero_point).movedim(case.axis, 1)
    if case.target.startswith("Quantized"):
        layer = quantized_layer(case.target, case.channels)
        layer.load_state_dict({key: tensor(value) for key, value in cases.quantized_state(case).items()})
        return array(layer(xq).int_repr())
    statistics = (tensor(a) for a in (given.weight, given.bias, given.mean, given.var))
    op = getattr(torch.ops.quantized, case.target.replace("quantized_batch_norm", "batch_norm2d"))
    return array(op(xq, *statistics, 1e-5, y_scale, given.y_zero_point).int_repr().movedim(1, case.axis))
