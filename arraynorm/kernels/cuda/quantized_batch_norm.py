"""Quantized batch norm on the GPU: one launch, the CPU's levels to the last one."""

from __future__ import annotations

from typing import Any

from arraynorm.kernels.cuda import _loader, _steps
from arraynorm.kernels.reference import quantized_batch_norm as reference
from arraynorm.typing import Array


@reference.quantized_batch_norm.register("cupy")
def quantized_batch_norm(
    x: Array,
    a: Array,
    b: Array,
    x_scale: float,
    x_zero_point: int,
    y_scale: float,
    y_zero_point: int,
    out: Array | None,
) -> Any:
    return _requantize(x, a, b, (x_scale, x_zero_point, y_scale, y_zero_point), False, out)


@reference.quantized_batch_norm_relu.register("cupy")
def quantized_batch_norm_relu(
    x: Array,
    a: Array,
    b: Array,
    x_scale: float,
    x_zero_point: int,
    y_scale: float,
    y_zero_point: int,
    out: Array | None,
) -> Any:
    return _requantize(x, a, b, (x_scale, x_zero_point, y_scale, y_zero_point), True, out)


def _requantize(x: Array, a: Array, b: Array, scales: tuple[float, ...], relu: bool, out: Array | None) -> Any:
    if not _steps.takes_quantized(x):
        return NotImplemented
    with _loader.on_device(x):
        y = _steps.like(x, out)
        _steps.requantize(x, _steps.statistic(a), _steps.statistic(b), scales, relu, y)
    return y
