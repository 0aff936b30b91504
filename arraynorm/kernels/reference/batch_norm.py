"""Batch norm over x (N, C, S): statistics per channel over N and S.

Split where a collective goes: stats -> (merge over ranks) -> apply, and reduce -> (sum over ranks) -> apply. Without
one, forward and backward are single kernels, made of the same parts and with the same bits.
Source: Ioffe & Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, section 3.
"""

from __future__ import annotations

from arraynorm import _array
from arraynorm.kernels._kernel import Kernel
from arraynorm.kernels.reference.moments import moments, reciprocal_std
from arraynorm.typing import Array


@Kernel
def batch_norm_stats(x: Array) -> tuple[Array, Array]:
    """x (N, C, S) -> mean (C,), m2 (C,), both float64; 0 and 0 for N * S = 0."""
    xp = _array.array_namespace(x)
    mean, m2 = moments(_array.widen(x), (0, 2))
    return xp.reshape(mean, (-1,)), xp.reshape(m2, (-1,))


@Kernel
def batch_norm_apply(
    x: Array, mean: Array, rstd: Array, weight: Array | None, bias: Array | None, out: Array | None
) -> Array:
    """x (N, C, S); mean, rstd, weight, bias (C,) -> y (N, C, S) = x_hat * weight + bias."""
    return _array.store(affine_of_x_hat(x, mean, rstd, weight, bias), x.dtype, out)


def affine_of_x_hat(x: Array, mean: Array, rstd: Array, weight: Array | None, bias: Array | None) -> Array:
    """y before it is rounded to x's dtype; batch norm + add + ReLU goes on from here."""
    mean, rstd, weight, bias = (_array.per_channel(a, axis=1, ndim=3) for a in (mean, rstd, weight, bias))
    y = (_array.widen(x) - mean) * rstd
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


@Kernel
def batch_norm_forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None
) -> tuple[Array, Array, Array, Array]:
    """x (N, C, S); weight, bias (C,) -> y (N, C, S); mean, var, rstd (C,) float64, var biased."""
    mean, m2 = batch_norm_stats.reference(x)
    var = m2 / max(x.shape[0] * x.shape[2], 1)
    rstd = reciprocal_std(var, eps)
    return batch_norm_apply.reference(x, mean, rstd, weight, bias, out), mean, var, rstd


@Kernel
def batch_norm_backward_reduce(dy: Array, x: Array, mean: Array, rstd: Array) -> tuple[Array, Array]:
    """dy, x (N, C, S); mean, rstd (C,) -> sum of dy (C,), sum of dy * x_hat (C,): dbias and dweight, float64."""
    xp = _array.array_namespace(dy)
    mean, rstd = (_array.per_channel(a, axis=1, ndim=3) for a in (mean, rstd))
    dy = _array.widen(dy)
    x_hat = (_array.widen(x) - mean) * rstd
    return xp.sum(dy, axis=(0, 2)), xp.sum(dy * x_hat, axis=(0, 2))


@Kernel
def batch_norm_backward_apply(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    mean_dy: Array,
    mean_dy_x_hat: Array,
    out: Array | None,
) -> Array:
    """dy, x (N, C, S); the others (C,) -> dx (N, C, S) = weight * rstd * (dy - mean(dy) - x_hat * mean(dy * x_hat))."""
    mean, rstd, weight, mean_dy, mean_dy_x_hat = (
        _array.per_channel(a, axis=1, ndim=3) for a in (mean, rstd, weight, mean_dy, mean_dy_x_hat)
    )
    x_hat = (_array.widen(x) - mean) * rstd
    dx = (_array.widen(dy) - mean_dy - x_hat * mean_dy_x_hat) * rstd
    return _array.store(dx if weight is None else dx * weight, x.dtype, out)


@Kernel
def batch_norm_frozen_backward_apply(
    dy: Array, x: Array, rstd: Array, weight: Array | None, out: Array | None
) -> Array:
    """dy, x (N, C, S); rstd, weight (C,) -> dx (N, C, S) = weight * rstd * dy: given statistics do not depend on x."""
    rstd, weight = (_array.per_channel(a, axis=1, ndim=3) for a in (rstd, weight))
    dx = _array.widen(dy) * rstd
    return _array.store(dx if weight is None else dx * weight, x.dtype, out)


@Kernel
def batch_norm_backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None
) -> tuple[Array, Array, Array]:
    """dy, x (N, C, S); mean, rstd, weight (C,) -> dx (N, C, S); dweight, dbias (C,) float64."""
    dbias, dweight = batch_norm_backward_reduce.reference(dy, x, mean, rstd)
    n = max(x.shape[0] * x.shape[2], 1)
    dx = batch_norm_backward_apply.reference(dy, x, mean, rstd, weight, dbias / n, dweight / n, out)
    return dx, dweight, dbias
