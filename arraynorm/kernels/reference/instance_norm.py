"""Instance norm over x (N, A, C, B): statistics per sample and channel, over A and B.

Source: Ulyanov, Vedaldi & Lempitsky, "Instance Normalization", 2016, https://arxiv.org/abs/1607.08022, equation 6.
It is group norm with one channel to a group; the formulas are written out for whoever reads this file alone.
"""

from __future__ import annotations

from arraynorm import _array
from arraynorm.kernels._kernel import Kernel
from arraynorm.kernels.reference.moments import mean_over, moments, reciprocal_std
from arraynorm.typing import Array

_SPATIAL = (1, 3)


@Kernel
def instance_norm_forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None
) -> tuple[Array, Array, Array, Array]:
    """x (N, A, C, B); weight, bias (C,) -> y (N, A, C, B); mean, var, rstd (N, C) float64, var biased."""
    xp = _array.array_namespace(x)
    n, a, c, b = x.shape
    mean, m2 = moments(_array.widen(x), _SPATIAL)
    var = m2 / max(a * b, 1)
    rstd = reciprocal_std(var, eps)
    y = (_array.widen(x) - mean) * rstd
    if weight is not None:
        y = y * _array.per_channel(weight, axis=2, ndim=4)
    if bias is not None:
        y = y + _array.per_channel(bias, axis=2, ndim=4)
    mean, var, rstd = (xp.reshape(s, (n, c)) for s in (mean, var, rstd))
    return _array.store(y, x.dtype, out), mean, var, rstd


@Kernel
def instance_norm_backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None
) -> tuple[Array, Array, Array]:
    """dy, x (N, A, C, B); mean, rstd (N, C); weight (C,) -> dx (N, A, C, B); dweight, dbias (C,) float64.

    dx = weight * rstd * (dy - mean(dy) - x_hat * mean(dy * x_hat)), means over the instance.
    """
    xp = _array.array_namespace(dy)
    mean, rstd = (xp.reshape(s, (s.shape[0], 1, s.shape[1], 1)) for s in (mean, rstd))
    x_hat = (_array.widen(x) - mean) * rstd
    dy = _array.widen(dy)
    dx = rstd * (dy - mean_over(dy, _SPATIAL) - x_hat * mean_over(dy * x_hat, _SPATIAL))
    if weight is not None:
        dx = dx * _array.per_channel(weight, axis=2, ndim=4)
    dweight = xp.sum(dy * x_hat, axis=(0, 1, 3))
    dbias = xp.sum(dy, axis=(0, 1, 3))
    return _array.store(dx, x.dtype, out), dweight, dbias
