"""Quantized batch norm: 8-bit integers in, 8-bit integers out, for inference (it has no gradient)."""

from __future__ import annotations

from typing import Any, cast

from arraynorm import _array, _check
from arraynorm.functional._statistics import check_statistics
from arraynorm.kernels import Kernel
from arraynorm.kernels.reference import quantized_batch_norm as kernels
from arraynorm.typing import Array


def quantized_batch_norm(
    xq: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    x_scale: float,
    x_zero_point: int,
    y_scale: float,
    y_zero_point: int,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Batch norm with given statistics on quantized values, x = (xq - x_zero_point) * x_scale.

    yq = clamp(rint(y / y_scale) + y_zero_point), with y = (x - mean) / sqrt(var + eps) * weight + bias.

    Parameters
    ----------
    xq : array (N, C, ...), uint8 or int8
    mean, var : array (C,), float16, bfloat16, float32 or float64
    weight, bias : array (C,), any of these dtypes, optional
        None is 1 and 0.
    x_scale, y_scale : float
        Finite and > 0; one for the whole array.
    x_zero_point, y_zero_point : int
        Within xq's dtype.
    axis, eps
        As for `batch_norm_forward`.
    out : array like xq, optional
        Receives yq (NumPy and CuPy); `out=xq` is allowed.

    Returns
    -------
    yq : array like xq

    Raises
    ------
    ValueError
        A wrong shape, axis, eps, scale or zero point; statistics or parameters that are not finite.
    TypeError
        xq is not uint8 or int8; a parameter of a dtype that is not one of the four, or of another library.

    Notes
    -----
    Computed in float64 and rounded half to even. Against torch 2.13, which computes in float32, results differ by
    one level, and only where y / y_scale lies next to a tie.

    References
    ----------
    Jacob et al., "Quantization and Training of Neural Networks", 2017, https://arxiv.org/abs/1712.05877
    """
    kernel = kernels.quantized_batch_norm
    return _run(kernel, xq, mean, var, weight, bias, x_scale, x_zero_point, y_scale, y_zero_point, axis, eps, out)


def quantized_batch_norm_relu(
    xq: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    x_scale: float,
    x_zero_point: int,
    y_scale: float,
    y_zero_point: int,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Batch norm with given statistics, then ReLU, on quantized values: `quantized_batch_norm` of max(y, 0).

    Parameters, returns, errors and notes as there.
    """
    kernel = kernels.quantized_batch_norm_relu
    return _run(kernel, xq, mean, var, weight, bias, x_scale, x_zero_point, y_scale, y_zero_point, axis, eps, out)


def _run(
    kernel: Kernel[Any, Array],
    xq: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    x_scale: float,
    x_zero_point: int,
    y_scale: float,
    y_zero_point: int,
    axis: int,
    eps: float,
    out: Array | None,
) -> Array:
    made = kernel.direct(xq, mean, var, weight, bias, x_scale, x_zero_point, y_scale, y_zero_point, axis, eps, out)
    if made is not None:
        return cast(Array, made)
    function = kernel.__name__
    _check.quantized(function, "xq", xq)
    _check.min_ndim(xq, 2)
    axis = _check.channel_axis(function, xq, axis)
    check_statistics(function, xq, mean, var, axis)
    for name, parameter in (("weight", weight), ("bias", bias)):
        _check.optional_companion(function, xq, name, parameter, (xq.shape[axis],))
    eps = _check.epsilon(function, eps)
    x_scale, y_scale = _check.scale(function, "x_scale", x_scale), _check.scale(function, "y_scale", y_scale)
    x_zero_point = _check.zero_point(function, "x_zero_point", x_zero_point, xq)
    y_zero_point = _check.zero_point(function, "y_zero_point", y_zero_point, xq)
    _check.output(function, "out", out, xq, apart_from=(mean, var, weight, bias), may_be=(xq,))
    a, b = kernels.folded_affine(mean, var, weight, bias, eps)
    if not (_check.is_finite(a) and _check.is_finite(b) and _check.is_finite(var)):
        for name, value in (("mean", mean), ("var", var), ("weight", weight), ("bias", bias)):
            if value is not None:
                _check.finite(function, name, value)
        _check.finite(function, "weight / sqrt(var + eps)", a)
        _check.finite(function, "bias - mean * weight / sqrt(var + eps)", b)
    shape = _array.channel_view(xq.shape, axis)
    view = _array.out_view(out, shape)
    x3 = _array.array_namespace(xq).reshape(xq, shape)
    yq = kernel(x3, a, b, x_scale, x_zero_point, y_scale, y_zero_point, view)
    return _array.deliver(yq, xq.shape, out, view)
