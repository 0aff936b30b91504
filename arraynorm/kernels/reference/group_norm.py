"""Group norm over x (N, A, C, B): statistics per sample and group of C / G adjacent channels, over A, C / G and B.

Source: Wu & He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494, equations 1 to 7.
"""

from __future__ import annotations

from arraynorm import _array
from arraynorm.kernels._kernel import Kernel
from arraynorm.kernels.reference.moments import mean_over, moments, reciprocal_std
from arraynorm.typing import Array

# x seen as (N, A, G, K, B): G groups of K channels.
_GROUP = (1, 3, 4)
_CHANNEL = (0, 1, 4)


@Kernel
def group_norm_forward(
    x: Array, num_groups: int, weight: Array | None, bias: Array | None, eps: float, out: Array | None
) -> tuple[Array, Array, Array, Array]:
    """x (N, A, C, B); weight, bias (C,) -> y (N, A, C, B); mean, var, rstd (N, G) float64, var biased."""
    xp = _array.array_namespace(x)
    grouped = xp.reshape(_array.widen(x), _grouped(x.shape, num_groups))
    mean, m2 = moments(grouped, _GROUP)
    var = m2 / max(_group_size(x.shape, num_groups), 1)
    rstd = reciprocal_std(var, eps)
    y = xp.reshape((grouped - mean) * rstd, x.shape)
    if weight is not None:
        y = y * _array.per_channel(weight, axis=2, ndim=4)
    if bias is not None:
        y = y + _array.per_channel(bias, axis=2, ndim=4)
    y = _array.store(y, x.dtype, out)
    mean, var, rstd = (xp.reshape(a, (x.shape[0], num_groups)) for a in (mean, var, rstd))
    return y, mean, var, rstd


@Kernel
def group_norm_backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None
) -> tuple[Array, Array, Array]:
    """dy, x (N, A, C, B); mean, rstd (N, G); weight (C,) -> dx (N, A, C, B); dweight, dbias (C,) float64.

    With g = dy * weight:  dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), means over the group.
    """
    xp = _array.array_namespace(dy)
    grouped = _grouped(x.shape, mean.shape[1])
    mean, rstd = (xp.reshape(a, (a.shape[0], 1, a.shape[1], 1, 1)) for a in (mean, rstd))
    x_hat = (xp.reshape(_array.widen(x), grouped) - mean) * rstd
    dy = xp.reshape(_array.widen(dy), grouped)
    g = dy if weight is None else dy * xp.reshape(_array.widen(weight), (1, 1, *grouped[2:4], 1))
    dx = rstd * (g - mean_over(g, _GROUP) - x_hat * mean_over(g * x_hat, _GROUP))
    dweight = xp.reshape(xp.sum(dy * x_hat, axis=_CHANNEL), (-1,))
    dbias = xp.reshape(xp.sum(dy, axis=_CHANNEL), (-1,))
    return _array.store(xp.reshape(dx, x.shape), x.dtype, out), dweight, dbias


def _grouped(shape: tuple[int, ...], num_groups: int) -> tuple[int, int, int, int, int]:
    n, a, c, b = shape
    return n, a, num_groups, c // num_groups, b


def _group_size(shape: tuple[int, ...], num_groups: int) -> int:
    _, a, c, b = shape
    return a * (c // num_groups) * b
