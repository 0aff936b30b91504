"""Layer norm over x (rows, K): statistics per row.

Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450, equations 3 and 4.
"""

from __future__ import annotations

from arraynorm import _array
from arraynorm.kernels._kernel import Kernel
from arraynorm.kernels.reference.moments import mean_over, moments, reciprocal_std
from arraynorm.typing import Array


@Kernel
def layer_norm_forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None
) -> tuple[Array, Array, Array]:
    """x (rows, K); weight, bias (K,) -> y (rows, K); mean, rstd (rows,) float64."""
    mean, m2 = moments(_array.widen(x), (1,))
    rstd = reciprocal_std(m2 / max(x.shape[1], 1), eps)
    y = (_array.widen(x) - mean) * rstd
    if weight is not None:
        y = y * _array.widen(weight)
    if bias is not None:
        y = y + _array.widen(bias)
    return _array.store(y, x.dtype, out), mean[:, 0], rstd[:, 0]


@Kernel
def layer_norm_backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None
) -> tuple[Array, Array, Array]:
    """dy, x (rows, K); mean, rstd (rows,); weight (K,) -> dx (rows, K); dweight, dbias (K,) float64.

    With g = dy * weight:  dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), means over the row.
    """
    xp = _array.array_namespace(dy)
    rstd = rstd[:, None]
    x_hat = (_array.widen(x) - mean[:, None]) * rstd
    dy = _array.widen(dy)
    g = dy if weight is None else dy * _array.widen(weight)
    dx = rstd * (g - mean_over(g, (1,)) - x_hat * mean_over(g * x_hat, (1,)))
    dweight, dbias = xp.sum(dy * x_hat, axis=0), xp.sum(dy, axis=0)  # before dx is written, perhaps over dy
    return _array.store(dx, x.dtype, out), dweight, dbias
