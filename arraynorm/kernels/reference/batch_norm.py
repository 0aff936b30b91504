"""Batch norm over x (N, C, S): statistics per channel over N and S.

Split where a collective goes: stats -> (merge over ranks) -> apply, and reduce -> (sum over ranks) -> apply.
Source: Ioffe & Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, section 3.
"""

from __future__ import annotations

from arraynorm import _array
from arraynorm.kernels._kernel import Kernel
from arraynorm.kernels.reference.moments import moments
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
