"""Group norm."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from arraynorm import _array, _check
from arraynorm.functional._backward import check_backward, parameter_gradients
from arraynorm.functional._forward import check_channels, check_output
from arraynorm.kernels.reference.group_norm import group_norm_backward as backward_kernel
from arraynorm.kernels.reference.group_norm import group_norm_forward as forward_kernel
from arraynorm.typing import AffineGradients, Array


class GroupNormCache(NamedTuple):
    """What `group_norm_backward` needs. It refers to x and weight and copies neither."""

    x: Array
    weight: Array | None
    bias: Array | None
    mean: Array
    """(N, G) float64."""
    rstd: Array
    """(N, G) float64: 1 / sqrt(biased variance + eps)."""
    axis: int
    """The channel axis of x, >= 1."""

    def to(self, xp: ModuleType) -> GroupNormCache:
        """The same cache with its arrays in the library `xp` (numpy, cupy, ...)."""
        return GroupNormCache(*_array.moved_fields(self, xp))


def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Group norm; y alone. See `group_norm_forward`; here `out=x` is allowed."""
    return _forward(x, num_groups, weight, bias, axis, eps, out, keep=False)[0]


def group_norm_forward(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, GroupNormCache]:
    """Group norm: y = (x - mean) / sqrt(var + eps) * weight + bias, statistics per sample and group of channels.

    Parameters
    ----------
    x : array (N, C, ...), float16, bfloat16, float32 or float64
        Axis 0 holds the samples; C may stand at any other `axis`.
    num_groups : int
        A divisor of C; a group is C / num_groups adjacent channels.
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
    cache : GroupNormCache
        For `group_norm_backward`.

    Raises
    ------
    ValueError
        C is not divisible by num_groups; a wrong shape, axis or eps; `out` read-only or overlapping.
    TypeError
        A dtype that is not one of the four; arrays of different libraries; masked arrays and matrices; an option of
        another type than its own.

    Notes
    -----
    A group of one value gives the bias, for every N; torch 2.13 raises for N = 1 only.

    References
    ----------
    Wu & He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494
    """
    return _forward(x, num_groups, weight, bias, axis, eps, out, keep=True)


def group_norm_backward(dy: Array, cache: GroupNormCache, *, out: Array | None = None) -> AffineGradients:
    """Gradients of `group_norm_forward`.

    With g = dy * weight: dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), means over the group.

    Parameters
    ----------
    dy : array, x's shape, any supported floating dtype
    cache : GroupNormCache
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
    function = "group_norm_backward"
    _check.cache_of(function, cache, GroupNormCache)
    x, weight, bias, mean, rstd, axis = cache
    made = backward_kernel.direct(dy, x, weight, bias, mean, rstd, axis, out)
    if made is not None:
        return AffineGradients(*made)
    check_backward(function, dy, x, out, needed=(x, weight, bias, mean, rstd))
    shape = _array.sample_view(x.shape, axis)
    xp = _array.array_namespace(x)
    view = _array.out_view(out, shape)
    dx, dweight, dbias = backward_kernel(xp.reshape(dy, shape), xp.reshape(x, shape), mean, rstd, weight, view)
    return AffineGradients(
        _array.deliver(dx, x.shape, out, view), *parameter_gradients(x, (weight, dweight), (bias, dbias))
    )


def _forward(
    x: Array,
    num_groups: int,
    weight: Array | None,
    bias: Array | None,
    axis: int,
    eps: float,
    out: Array | None,
    *,
    keep: bool,
) -> tuple[Array, GroupNormCache]:
    function = "group_norm"
    made = forward_kernel.direct(x, num_groups, weight, bias, axis, eps, out)
    if made is not None:
        y, kept = made
        return y, GroupNormCache._make(kept)
    axis, eps = check_channels(function, x, weight, bias, axis, eps, first=1)
    check_output(function, out, x, (weight, bias), keep=keep)
    num_groups = _check.groups(function, num_groups, x.shape[axis])
    shape = _array.sample_view(x.shape, axis)
    view = _array.out_view(out, shape)
    x4 = _array.array_namespace(x).reshape(x, shape)
    y, mean, _, rstd = forward_kernel(x4, num_groups, weight, bias, eps, view)
    return _array.deliver(y, x.shape, out, view), GroupNormCache(x, weight, bias, mean, rstd, axis)
