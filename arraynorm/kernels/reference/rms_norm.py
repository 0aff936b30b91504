"""RMS norm over x (rows, K): each row divided by its root mean square; no mean is subtracted.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467, equation 4.
"""

from __future__ import annotations

from arraynorm import _array
from arraynorm.kernels._kernel import Kernel
from arraynorm.kernels.reference.moments import mean_over, mean_square, reciprocal_std
from arraynorm.typing import Array


@Kernel
def rms_norm_forward(x: Array, weight: Array | None, eps: float, out: Array | None) -> tuple[Array, Array]:
    """x (rows, K); weight (K,) -> y (rows, K) = x * rstd * weight; rstd (rows,) float64."""
    wide = _array.widen(x)
    rstd = reciprocal_std(mean_square(wide, (1,)), eps)
    y = wide * rstd
    if weight is not None:
        y = y * _array.widen(weight)
    return _array.store(y, x.dtype, out), rstd[:, 0]


@Kernel
def rms_norm_backward(dy: Array, x: Array, rstd: Array, weight: Array | None, out: Array | None) -> tuple[Array, Array]:
    """dy, x (rows, K); rstd (rows,); weight (K,) -> dx (rows, K); dweight (K,) float64.

    With x_hat = x * rstd and g = dy * weight:  dx = rstd * (g - x_hat * mean(g * x_hat)), the mean over the row.
    """
    xp = _array.array_namespace(dy)
    rstd = rstd[:, None]
    x_hat = _array.widen(x) * rstd
    dy = _array.widen(dy)
    g = dy if weight is None else dy * _array.widen(weight)
    dx = rstd * (g - x_hat * mean_over(g * x_hat, (1,)))
    dweight = xp.sum(dy * x_hat, axis=0)  # before dx is written, perhaps over dy
    return _array.store(dx, x.dtype, out), dweight
