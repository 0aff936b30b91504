"""Instance norm."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from arraynorm import _array, _check
from arraynorm.functional._backward import check_backward, parameter_gradients
from arraynorm.functional._forward import check_channels, check_output
from arraynorm.kernels.reference.instance_norm import instance_norm_backward as backward_kernel
from arraynorm.kernels.reference.instance_norm import instance_norm_forward as forward_kernel
from arraynorm.typing import AffineGradients, Array


class InstanceNormCache(NamedTuple):
    """What `instance_norm_backward` and `update_running_stats` need. It refers to x and weight and copies neither."""

    x: Array
    weight: Array | None
    bias: Array | None
    mean: Array
    """(N, C) float64."""
    var: Array
    """(N, C) float64: **biased** variances."""
    rstd: Array
    """(N, C) float64: 1 / sqrt(var + eps)."""
    n: int
    """Spatial elements: values per sample and channel."""
    axis: int
    """The channel axis of x, >= 1."""

    def to(self, xp: ModuleType) -> InstanceNormCache:
        """The same cache with its arrays in the library `xp` (numpy, cupy, ...)."""
        return InstanceNormCache(*_array.moved_fields(self, xp))


def instance_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Instance norm; y alone. See `instance_norm_forward`; here `out=x` is allowed."""
    return _forward(x, weight, bias, axis, eps, out, keep=False)[0]


def instance_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, InstanceNormCache]:
    """Instance norm: y = (x - mean) / sqrt(var + eps) * weight + bias, statistics per sample and channel.

    Parameters
    ----------
    x : array (N, C, ...), float16, bfloat16, float32 or float64
        At least three dimensions. Axis 0 holds the samples; C may stand at any other `axis`.
    weight, bias : array (C,), any of these dtypes, optional
        None is 1 and 0.
    axis : int
        The channel axis, not 0.
    eps : float
        Added to the **biased** variance; >= 0.
    out : array like x, optional
        Receives y (NumPy and CuPy). It must not overlap x, which the cache refers to.

    Returns
    -------
    y : array like x
    cache : InstanceNormCache
        For `instance_norm_backward` and `update_running_stats`.

    Raises
    ------
    ValueError
        One spatial element; a wrong shape, axis or eps; `out` read-only or overlapping.
    TypeError
        A dtype that is not one of the four; arrays of different libraries; masked arrays and matrices; an option of
        another type than its own.

    References
    ----------
    Ulyanov, Vedaldi & Lempitsky, "Instance Normalization", 2016, https://arxiv.org/abs/1607.08022
    """
    return _forward(x, weight, bias, axis, eps, out, keep=True)


def instance_norm_backward(dy: Array, cache: InstanceNormCache, *, out: Array | None = None) -> AffineGradients:
    """Gradients of `instance_norm_forward`.

    dx = weight * rstd * (dy - mean(dy) - x_hat * mean(dy * x_hat)), means over the instance.

    Parameters
    ----------
    dy : array, x's shape, any supported floating dtype
    cache : InstanceNormCache
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
    function = "instance_norm_backward"
    _check.cache_of(function, cache, InstanceNormCache)
    x, weight, bias, mean, var, rstd, _, axis = cache
    made = backward_kernel.direct(dy, x, weight, bias, mean, var, rstd, axis, out)
    if made is not None:
        return AffineGradients(*made)
    check_backward(function, dy, x, out, needed=(x, weight, bias, mean, var, rstd))
    shape = _array.sample_view(x.shape, axis)
    xp = _array.array_namespace(x)
    view = _array.out_view(out, shape)
    dx, dweight, dbias = backward_kernel(xp.reshape(dy, shape), xp.reshape(x, shape), mean, rstd, weight, view)
    return AffineGradients(
        _array.deliver(dx, x.shape, out, view), *parameter_gradients(x, (weight, dweight), (bias, dbias))
    )


def _forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    axis: int,
    eps: float,
    out: Array | None,
    *,
    keep: bool,
) -> tuple[Array, InstanceNormCache]:
    function = "instance_norm"
    made = forward_kernel.direct(x, weight, bias, axis, eps, out)
    if made is not None:
        y, kept = made
        return y, InstanceNormCache._make(kept)
    axis, eps = check_channels(function, x, weight, bias, axis, eps, first=1)
    check_output(function, out, x, (weight, bias), keep=keep)
    shape = _array.sample_view(x.shape, axis)
    count = shape[1] * shape[3]
    _check.more_than_one_spatial_element(count, tuple(x.shape))
    view = _array.out_view(out, shape)
    x4 = _array.array_namespace(x).reshape(x, shape)
    y, mean, var, rstd = forward_kernel(x4, weight, bias, eps, view)
    return _array.deliver(y, x.shape, out, view), InstanceNormCache(x, weight, bias, mean, var, rstd, count, axis)
