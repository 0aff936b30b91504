"""RMS norm."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from arraynorm import _array, _check
from arraynorm.functional._backward import check_backward, parameter_gradients
from arraynorm.functional._forward import check_output, check_rows
from arraynorm.kernels.reference.rms_norm import rms_norm_backward as backward_kernel
from arraynorm.kernels.reference.rms_norm import rms_norm_forward as forward_kernel
from arraynorm.typing import Array, RMSNormGradients


class RMSNormCache(NamedTuple):
    """What `rms_norm_backward` needs. It refers to x and weight and copies neither."""

    x: Array
    weight: Array | None
    rstd: Array
    """(rows,) float64: 1 / sqrt(mean square + eps), rows in C order of x's leading dimensions."""
    normalized_shape: tuple[int, ...]

    def to(self, xp: ModuleType) -> RMSNormCache:
        """The same cache with its arrays in the library `xp` (numpy, cupy, ...)."""
        return RMSNormCache(*_array.moved_fields(self, xp))


_cache_of = RMSNormCache._make  # takes half of the time of the class itself: a fifth of a small call


def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    *,
    eps: float | None = None,
    out: Array | None = None,
) -> Array:
    """RMS norm; y alone. See `rms_norm_forward`; here `out=x` is allowed."""
    return _forward(x, normalized_shape, weight, eps, out, keep=False)[0]


def rms_norm_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    *,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, RMSNormCache]:
    """RMS norm: y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimensions.

    Parameters
    ----------
    x : array (..., *normalized_shape), float16, bfloat16, float32 or float64
    normalized_shape : int or sequence of int
        The last dimensions of x, at least one.
    weight : array (*normalized_shape), any of these dtypes, optional
        None is 1.
    eps : float, optional
        Added to the mean square; >= 0. None is the machine epsilon of the computation dtype, the widest of x, weight
        and float32 (so float32's for float16 and bfloat16), as in torch 2.13.
    out : array like x, optional
        Receives y (NumPy and CuPy). It must not overlap x, which the cache refers to.

    Returns
    -------
    y : array like x
    cache : RMSNormCache
        For `rms_norm_backward`.

    Raises
    ------
    ValueError
        x does not end with normalized_shape; a wrong shape or eps; `out` read-only or overlapping.
    TypeError
        A dtype that is not one of the four; arrays of different libraries; masked arrays and matrices; an option of
        another type than its own.

    References
    ----------
    Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467
    """
    return _forward(x, normalized_shape, weight, eps, out, keep=True)


def rms_norm_backward(dy: Array, cache: RMSNormCache, *, out: Array | None = None) -> RMSNormGradients:
    """Gradients of `rms_norm_forward`.

    With x_hat = x * rstd and g = dy * weight: dx = rstd * (g - x_hat * mean(g * x_hat)).

    Parameters
    ----------
    dy : array, x's shape, any supported floating dtype
    cache : RMSNormCache
    out : array like x, optional
        Receives dx; `out=dy` is allowed.

    Returns
    -------
    RMSNormGradients

    Raises
    ------
    ValueError, TypeError
        As for the forward.
    """
    function = "rms_norm_backward"
    _check.cache_of(function, cache, RMSNormCache)
    x, weight, rstd, normalized_shape = cache
    made = backward_kernel.direct(dy, x, weight, rstd, normalized_shape, out)
    if made is not None:
        return RMSNormGradients(*made)
    check_backward(function, dy, x, out, needed=(x, weight, rstd))
    shape = _array.row_view(x.shape, len(normalized_shape))
    xp = _array.array_namespace(x)
    view = _array.out_view(out, shape)
    dx, dweight = backward_kernel(xp.reshape(dy, shape), xp.reshape(x, shape), rstd, _array.flat(weight), view)
    dweight = xp.reshape(dweight, normalized_shape)
    return RMSNormGradients(_array.deliver(dx, x.shape, out, view), *parameter_gradients(x, (weight, dweight)))


def _forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None,
    eps: float | None,
    out: Array | None,
    *,
    keep: bool,
) -> tuple[Array, RMSNormCache]:
    function = "rms_norm"
    made = forward_kernel.direct(x, normalized_shape, weight, eps, out)
    if made is not None:
        y, kept = made
        return y, _cache_of(kept)
    normalized_shape = check_rows(function, x, normalized_shape, weight=weight)
    check_output(function, out, x, (weight,), keep=keep)
    if eps is None:
        eps = float(_array.array_namespace(x).finfo(_array.widest_dtype(x, weight)).eps)
    eps = _check.epsilon(function, eps)
    shape = _array.row_view(x.shape, len(normalized_shape))
    view = _array.out_view(out, shape)
    x2 = _array.array_namespace(x).reshape(x, shape)
    y, rstd = forward_kernel(x2, _array.flat(weight), eps, view)
    return _array.deliver(y, x.shape, out, view), RMSNormCache(x, weight, rstd, normalized_shape)
