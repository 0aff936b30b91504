"""Quantized batch norm, uint8 to uint8."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

import arraynorm as an
from cases import EPS, Case, Competitor, Data, alone

SHAPE = (32, 64, 56, 56)
LAYOUTS = ("contiguous", "channels last")
CASES = [
    Case("quantized_batch_norm", op, SHAPE, "uint8", layout) for op in ("forward", "relu forward") for layout in LAYOUTS
]

X_SCALE, X_ZERO, Y_SCALE, Y_ZERO = 0.05, 128, 0.04, 120
QUANTIZATION = {"x_scale": X_SCALE, "x_zero_point": X_ZERO, "y_scale": Y_SCALE, "y_zero_point": Y_ZERO}


def with_arraynorm(d: Data) -> Mapping[str, Competitor]:
    function = an.quantized_batch_norm_relu if d.case.op == "relu forward" else an.quantized_batch_norm
    run = partial(function, d.x, d.mean, d.var, d.weight, d.bias, **QUANTIZATION, axis=d.axis)
    return {
        "arraynorm": Competitor(run, alone),
        "arraynorm out=": Competitor(lambda: run(out=d.out), alone),
    }


def reference(d: Data) -> tuple[Any]:
    """The formula in float64."""
    return (_formula(d, np.float64),)


def with_numpy(d: Data) -> Mapping[str, Competitor]:
    return {"numpy": Competitor(lambda: _formula(d, np.float32), alone)}


def _formula(d: Data, dtype: Any) -> Any:
    shape = [-1 if i == d.axis % d.x.ndim else 1 for i in range(d.x.ndim)]
    mean, var, weight, bias = (a.astype(dtype).reshape(shape) for a in (d.mean, d.var, d.weight, d.bias))
    x = (d.x.astype(dtype) - dtype(X_ZERO)) * dtype(X_SCALE)
    y = (x - mean) / np.sqrt(var + dtype(EPS)) * weight + bias
    if d.case.op == "relu forward":
        y = np.maximum(y, 0)
    return np.clip(np.rint(y / dtype(Y_SCALE)) + Y_ZERO, 0, 255).astype(np.uint8)


def with_torch(d: Data) -> Mapping[str, Competitor]:
    """Its kernel needs channels last: given another layout, it converts, and it never converts back."""
    import torch

    from torch_arrays import array, tensors

    x, w, b, mean, var = tensors(d, "x", "weight", "bias", "mean", "var")
    quantized = torch._make_per_tensor_quantized_tensor(x, X_SCALE, X_ZERO)
    name = "batch_norm2d_relu" if d.case.op == "relu forward" else "batch_norm2d"
    function = getattr(torch.ops.quantized, name).default
    arguments = (quantized, w, b, mean, var, EPS, Y_SCALE, Y_ZERO)
    return {"torch": Competitor(lambda: function(*arguments), lambda y: [array(y.int_repr(), d.axis)])}


def with_numba(d: Data) -> Mapping[str, Competitor]:
    from numba_kernels import quantized_batch_norm as kernels

    scale = d.weight / np.sqrt(d.var + EPS)
    a = (scale * X_SCALE / Y_SCALE).astype(np.float32)
    b = ((d.bias - (d.mean + X_ZERO * X_SCALE) * scale) / Y_SCALE + Y_ZERO).astype(np.float32)
    low = np.float32(Y_ZERO if d.case.op == "relu forward" else 0)
    C = len(a)
    kernel, shape = (kernels.columns, (-1, C)) if d.axis == -1 else (kernels.planes, (len(d.x), C, -1))
    run = partial(kernel.variant(d.x.size), d.x.reshape(shape), a, b, low, d.out.reshape(shape))
    return {"numba": Competitor(run, lambda _: (d.out,))}
