"""Parity cases run by arraynorm."""

from __future__ import annotations

from typing import Any

import numpy as np

import arraynorm as an
from arraynorm.distributed import SELF
from parity import cases
from parity.cases import Array, Case, LayerCase, OpCase, QuantizedCase, Results


def results(case: Case) -> Results:
    """y, the gradients, and running statistics where there are some, by name; of a layer's y and dx the last step's.

    With ReLU also `open`: for each step where y > 0, which is where the gradient went through.
    """
    if isinstance(case, OpCase):
        return _op(case)
    return _layer(case) if isinstance(case, LayerCase) else {"yq": _quantized(case)}


def _op(case: OpCase) -> Results:
    given = cases.inputs(case)
    arrays = {key: getattr(given, key) for key in cases.parameters(case)}
    if given.addend is not None:
        arrays["addend"] = given.addend[0]
    elif case.target == "batch_norm_add_relu_frozen":
        arrays["addend"] = None
    if case.target.endswith("frozen"):
        arrays |= {"mean": given.running_mean, "var": given.running_var}
    forward, backward = getattr(an, f"{case.target}_forward"), getattr(an, f"{case.target}_backward")
    y, cache = forward(given.x[0], **arrays, **dict(case.options))
    found = {"y": y, **backward(given.dy[0], cache)._asdict()}
    if "relu" in case.target:
        found["open"] = y[None] > 0
    if case.target in ("batch_norm", "batch_norm_add_relu", "instance_norm"):
        found["running_mean"], found["running_var"] = an.update_running_stats(
            given.running_mean, given.running_var, cache, momentum=case.momentum
        )
    return {key: value for key, value in found.items() if value is not None}


def _layer(case: LayerCase) -> Results:
    layer, given, y_open = build(case), cases.inputs(case), []
    for step, mode in enumerate(case.modes):
        layer.train(mode == "t")
        y = layer(*(arrays[step] for arrays in (given.x, given.addend) if arrays is not None))
        dx = layer.backward(given.dy[step])
        y_open.append(y > 0)
    found = {"y": y, **(dx._asdict() if isinstance(dx, tuple) else {"dx": dx})}
    if case.target.startswith("Fused"):
        found["open"] = np.stack(y_open)
    found |= {f"d{key}": gradient for key, gradient in layer.grads.items()}
    found |= dict(layer.named_buffers())
    return {key: value for key, value in found.items() if value is not None}


def build(case: LayerCase) -> Any:
    """The layer of a case, with the case's numbers in its state."""
    options: dict[str, Any] = dict(case.options)
    if case.target == "SyncBatchNorm":
        options["comm"] = SELF
    layer = getattr(an, case.target)(**options, dtype=np.dtype(case.dtype))
    layer.load_state_dict(cases.state(case))
    for attribute, value in case.changed:
        setattr(layer, attribute, value)
    return layer


def _quantized(case: QuantizedCase) -> Array:
    given, (x_scale, y_scale) = cases.quantized_inputs(case), case.scales
    if case.target.startswith("Quantized"):
        layer = getattr(an, case.target)(case.channels)
        layer.load_state_dict(cases.quantized_state(case))
        return layer(given.xq, x_scale, given.x_zero_point)
    statistics = given.mean, given.var, given.weight, given.bias
    x_quantization = {"x_scale": x_scale, "x_zero_point": given.x_zero_point}
    y_quantization = {"y_scale": y_scale, "y_zero_point": given.y_zero_point}
    return getattr(an, case.target)(given.xq, *statistics, **x_quantization, **y_quantization, axis=case.axis)
