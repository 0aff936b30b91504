"""Batch norm with given statistics, from 8-bit integers to 8-bit integers, over x (N, C, S).

With a = weight / sqrt(var + eps) and b = bias - mean * a, in float64:
    v = (x - x_zero_point) * x_scale * a + b
    y = clamp(rint(v / y_scale) + y_zero_point), ties to even.
Source: the affine quantization of Jacob et al., 2017, https://arxiv.org/abs/1712.05877, equation 1.
"""

from __future__ import annotations

from arraynorm import _array
from arraynorm.kernels._kernel import Kernel
from arraynorm.kernels.reference.moments import reciprocal_std
from arraynorm.typing import Array


def folded_affine(mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float) -> tuple[Array, Array]:
    """mean, var, weight, bias (C,) -> a, b (C,) float64. Folding the mean into b costs nothing at 8 bits."""
    a = reciprocal_std(_array.widen(var), eps)
    with _array.silent():
        if weight is not None:
            a = a * _array.widen(weight)
        b = -_array.widen(mean) * a
        return a, b if bias is None else _array.widen(bias) + b


@Kernel
def quantized_batch_norm(
    x: Array,
    a: Array,
    b: Array,
    x_scale: float,
    x_zero_point: int,
    y_scale: float,
    y_zero_point: int,
    out: Array | None,
) -> Array:
    """x (N, C, S) uint8 or int8; a, b (C,) float64 -> y (N, C, S) in x's dtype."""
    v = _dequantized_affine(x, a, b, x_scale, x_zero_point)
    return _requantize(v, y_scale, y_zero_point, x.dtype, out)


@Kernel
def quantized_batch_norm_relu(
    x: Array,
    a: Array,
    b: Array,
    x_scale: float,
    x_zero_point: int,
    y_scale: float,
    y_zero_point: int,
    out: Array | None,
) -> Array:
    """As `quantized_batch_norm`, with v clamped at 0 from below."""
    xp = _array.array_namespace(x)
    v = _dequantized_affine(x, a, b, x_scale, x_zero_point)
    return _requantize(xp.maximum(v, xp.zeros_like(v)), y_scale, y_zero_point, x.dtype, out)


def _dequantized_affine(x: Array, a: Array, b: Array, x_scale: float, x_zero_point: int) -> Array:
    xp = _array.array_namespace(x)
    a, b = (_array.per_channel(s, axis=1, ndim=3) for s in (a, b))
    v = (_array.widen(x) - x_zero_point) * x_scale * a + b
    return xp.where(xp.isnan(v), b, v)  # of finite factors only an overflow times 0 gives NaN, and it means 0


def _requantize(v: Array, scale: float, zero_point: int, dtype: object, out: Array | None) -> Array:
    xp = _array.array_namespace(v)
    limits = xp.iinfo(dtype)
    levels = xp.round(v / scale) + zero_point  # round: half to even, as rint
    return _array.store(xp.clip(levels, float(limits.min), float(limits.max)), dtype, out)
