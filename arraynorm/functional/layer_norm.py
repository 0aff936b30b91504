"""Layer norm."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from arraynorm import _array, _check
from arraynorm.functional._backward import check_backward, parameter_gradients
from arraynorm.functional._forward import check_output, check_rows
from arraynorm.kernels.reference.layer_norm import layer_norm_backward as backward_kernel
from arraynorm.kernels.reference.layer_norm import layer_norm_forward as forward_kernel
from arraynorm.typing import AffineGradients, Array


class LayerNormCache(NamedTuple):
    """What `layer_norm_backward` needs. It refers to x and weight and copies neither."""

    x: Array
    weight: Array | None
    bias: Array | None
    mean: Array
    """(rows,) float64, rows in C order of x's leading dimensions."""
    rstd: Array
    """(rows,) float64: 1 / sqrt(biased variance + eps)."""
    normalized_shape: tuple[int, ...]

    def to(self, xp: ModuleType) -> LayerNormCache:
        """The same cache with its arrays in the library `xp` (numpy, cupy, ...)."""
        return LayerNormCache(*_array.moved_fields(self, xp))


_cache_of = LayerNormCache._make  # takes half of the time of the class itself: a fifth of a small call


def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Layer norm; y alone. See `layer_norm_forward`; here `out=x` is allowed."""
    return _forward(x, normalized_shape, weight, bias, eps, out, keep=False)[0]


def layer_norm_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, LayerNormCache]:
    """Layer norm: y = (x - mean) / sqrt(var + eps) * weight + bias, statistics over the last dimensions.

    Parameters
    ----------
    x : array (..., *normalized_shape), float16, bfloat16, float32 or float64
    normalized_shape : int or sequence of int
        The last dimensions of x, at least one.
    weight, bias : array (*normalized_shape), any of these dtypes, optional
        None is 1 and 0.
    eps : float
        Added to the **biased** variance; >= 0.
    out : array like x, optional
        Receives y (NumPy and CuPy). It must not overlap x, which the cache refers to.

    Returns
    -------
    y : array like x
    cache : LayerNormCache
        For `layer_norm_backward`.

    Raises
    ------
    ValueError
        x does not end with normalized_shape; a wrong shape or eps; `out` read-only or overlapping.
    TypeError
        A dtype that is not one of the four; arrays of different libraries; masked arrays and matrices; an option of
        another type than its own.

    References
    ----------
    Ba, Kiros & Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450
    """
    return _forward(x, normalized_shape, weight, bias, eps, out, keep=True)


def layer_norm_backward(dy: Array, cache: LayerNormCache, *, out: Array | None = None) -> AffineGradients:
    """Gradients of `layer_norm_forward`.

    With g = dy * weight: dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), means over the normalized dimensions.

    Parameters
    ----------
    dy : array, x's shape, any supported floating dtype
    cache : LayerNormCache
    out : array like x, optional
        Receives dx; `out=dy` is allowed.

    Returns
    -------
    AffineGradients

    Raises
    ------
    ValueError, TypeError
        As for the forward.
    """
    function = "layer_norm_backward"
    _check.cache_of(function, cache, LayerNormCache)
    x, weight, bias, mean, rstd, normalized_shape = cache
    made = backward_kernel.direct(dy, x, weight, bias, mean, rstd, normalized_shape, out)
    if made is not None:
        return AffineGradients(*made)
    check_backward(function, dy, x, out, needed=(x, weight, bias, mean, rstd))
    shape = _array.row_view(x.shape, len(normalized_shape))
    xp = _array.array_namespace(x)
    view = _array.out_view(out, shape)
    flat_weight = _array.flat(weight)
    dx, dweight, dbias = backward_kernel(xp.reshape(dy, shape), xp.reshape(x, shape), mean, rstd, flat_weight, view)
    dweight, dbias = (xp.reshape(gradient, normalized_shape) for gradient in (dweight, dbias))
    return AffineGradients(
        _array.deliver(dx, x.shape, out, view), *parameter_gradients(x, (weight, dweight), (bias, dbias))
    )


def _forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array | None,
    *,
    keep: bool,
) -> tuple[Array, LayerNormCache]:
    function = "layer_norm"
    made = forward_kernel.direct(x, normalized_shape, weight, bias, eps, out)
    if made is not None:
        y, kept = made
        return y, _cache_of(kept)
    normalized_shape = check_rows(function, x, normalized_shape, weight=weight, bias=bias)
    check_output(function, out, x, (weight, bias), keep=keep)
    eps = _check.epsilon(function, eps)
    shape = _array.row_view(x.shape, len(normalized_shape))
    view = _array.out_view(out, shape)
    x2 = _array.array_namespace(x).reshape(x, shape)
    y, mean, rstd = forward_kernel(x2, _array.flat(weight), _array.flat(bias), eps, view)
    return _array.deliver(y, x.shape, out, view), LayerNormCache(x, weight, bias, mean, rstd, normalized_shape)
