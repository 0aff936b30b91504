"""Batch norm: with batch statistics (local or over ranks), and with given ones."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from arraynorm import _array, _check
from arraynorm.functional._agreement import agreement
from arraynorm.functional._backward import check_backward, parameter_gradients
from arraynorm.functional._forward import check_channels, check_output
from arraynorm.functional._statistics import (
    check_statistics,
    forward_fields,
    frozen_statistics,
    global_means,
    local_count,
    merged_statistics,
)
from arraynorm.kernels.reference import batch_norm as kernels
from arraynorm.kernels.reference.moments import reciprocal_std
from arraynorm.typing import AffineGradients, Array, Communicator


class BatchNormCache(NamedTuple):
    """What `batch_norm_backward` and `update_running_stats` need. It refers to x and weight and copies neither."""

    x: Array
    """The input, in its own shape and dtype."""
    weight: Array | None
    bias: Array | None
    mean: Array
    """(C,) float64: mean over all ranks."""
    var: Array
    """(C,) float64: **biased** variance over all ranks."""
    rstd: Array
    """(C,) float64: 1 / sqrt(var + eps)."""
    n: int
    """Values per channel over all ranks."""
    axis: int
    """The channel axis of x, >= 0."""
    comm: Communicator | None

    def to(self, xp: ModuleType) -> BatchNormCache:
        """The same cache with its arrays in the library `xp` (numpy, cupy, ...)."""
        return BatchNormCache(*_array.moved_fields(self, xp))


class FrozenBatchNormCache(NamedTuple):
    """What `batch_norm_frozen_backward` needs. It refers to x and weight and copies neither."""

    x: Array
    weight: Array | None
    bias: Array | None
    mean: Array
    """(C,) float64: a copy of the given mean."""
    rstd: Array
    """(C,) float64: 1 / sqrt(var + eps)."""
    axis: int

    def to(self, xp: ModuleType) -> FrozenBatchNormCache:
        """The same cache with its arrays in the library `xp` (numpy, cupy, ...)."""
        return FrozenBatchNormCache(*_array.moved_fields(self, xp))


# -- batch statistics ------------------------------------------------------------------------------------------


_cache_of = BatchNormCache._make  # takes half of the time of the class itself: a fifth of a small call


def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    comm: Communicator | None = None,
    out: Array | None = None,
) -> Array:
    """Batch norm with the statistics of x; y alone. See `batch_norm_forward`; here `out=x` is allowed."""
    return _forward(x, weight, bias, axis, eps, comm, out, keep=False)[0]


def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    comm: Communicator | None = None,
    out: Array | None = None,
) -> tuple[Array, BatchNormCache]:
    """Batch norm with the statistics of x: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Mean and **biased** variance are taken per channel over all other axes, and over all ranks of `comm`.

    Parameters
    ----------
    x : array (N, C, ...), float16, bfloat16, float32 or float64
        Any number of dimensions; C may stand at any `axis`. NumPy, CuPy or any array API library.
    weight, bias : array (C,), any of these dtypes, optional
        None is 1 and 0.
    axis : int
        The channel axis.
    eps : float
        Added to the variance; >= 0. With eps = 0 a channel without deviation gives y = bias and dx = 0.
    comm : Communicator, optional
        The ranks that share their statistics (`arraynorm.distributed`); None is this process alone. All of them must
        make the call, with equal settings; a rank may have no samples.
    out : array like x, optional
        Receives y (NumPy and CuPy). It must not overlap x, which the cache refers to.

    Returns
    -------
    y : array like x
    cache : BatchNormCache
        For `batch_norm_backward` and `update_running_stats`.

    Raises
    ------
    ValueError
        One value per channel (over all ranks); a wrong shape, axis or eps; `out` read-only or overlapping.
    TypeError
        A dtype that is not one of the four; arrays of different libraries; masked arrays and matrices; an option of
        another type than its own.
    SyncMismatchError
        With `comm`: on every rank, if the ranks' calls differ or one of them raises one of the above.

    Notes
    -----
    Statistics are summed about a pivot, never as E[x^2] - E[x]^2, and stay in float64 in the cache: a constant
    channel gives y == bias at any magnitude, where torch 2.13 on the CPU is off by 0.083 at 1e4 + 0.3 in float32.
    An empty x (no samples) gives an empty y. Squares are those of float64: deviations beyond 1e154 make y NaN, and
    with eps = 0 those below 1e-154 lose digits, until from 1e-162 they count as none.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167
    """
    return _forward(x, weight, bias, axis, eps, comm, out, keep=True)


def batch_norm_backward(dy: Array, cache: BatchNormCache, *, out: Array | None = None) -> AffineGradients:
    """Gradients of `batch_norm_forward`, through the batch statistics.

    dx = weight * rstd * (dy - mean(dy) - x_hat * mean(dy * x_hat)), means over all ranks of the forward's `comm`.

    Parameters
    ----------
    dy : array, x's shape, any supported floating dtype
    cache : BatchNormCache
    out : array like x, optional
        Receives dx; `out=dy` is allowed.

    Returns
    -------
    AffineGradients
        dx; dweight and dbias, which are **this rank's** sums: data-parallel training adds them once, with all others.

    Raises
    ------
    ValueError, TypeError
        As for the forward; with a communicator they become a SyncMismatchError on every rank.
    """
    function = "batch_norm_backward"
    _check.cache_of(function, cache, BatchNormCache)
    x, weight, bias, mean, var, rstd, count, axis, comm = cache
    if comm is None:
        made = kernels.batch_norm_backward.direct(dy, x, weight, bias, mean, var, rstd, axis, out)
        if made is not None:
            return AffineGradients(*made)
    with agreement(comm) as fields:
        check_backward(function, dy, x, out, needed=(x, weight, bias, mean, var, rstd))
        fields.update(operation=function, channels=mean.shape[0], dtype=_array.dtype_name(x.dtype), ndim=x.ndim)
    shape = _array.channel_view(x.shape, axis)
    xp = _array.array_namespace(x)
    dy3, x3 = xp.reshape(dy, shape), xp.reshape(x, shape)
    view = _array.out_view(out, shape)
    if comm is None:
        dx, dweight, dbias = kernels.batch_norm_backward(dy3, x3, mean, rstd, weight, view)
    else:
        dbias, dweight = kernels.batch_norm_backward_reduce(dy3, x3, mean, rstd)
        means = global_means((dbias, dweight), count, comm)
        dx = kernels.batch_norm_backward_apply(dy3, x3, mean, rstd, weight, *means, view)
    return AffineGradients(
        _array.deliver(dx, x.shape, out, view), *parameter_gradients(x, (weight, dweight), (bias, dbias))
    )


def _forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    axis: int,
    eps: float,
    comm: Communicator | None,
    out: Array | None,
    *,
    keep: bool,
) -> tuple[Array, BatchNormCache]:
    function = "batch_norm"
    if comm is None:
        made = kernels.batch_norm_forward.direct(x, weight, bias, axis, eps, out)
        if made is not None:
            y, kept = made
            return y, _cache_of(kept)
    _check.communicator(function, comm)
    with agreement(comm) as fields:
        axis, eps = check_channels(function, x, weight, bias, axis, eps)
        check_output(function, out, x, (weight, bias), keep=keep)
        fields.update(forward_fields(function, x, weight, bias, axis, eps, keep))
    shape = _array.channel_view(x.shape, axis)
    x3 = _array.array_namespace(x).reshape(x, shape)
    view = _array.out_view(out, shape)
    if comm is None:
        count = local_count(x3, x.shape)
        y, mean, var, rstd = kernels.batch_norm_forward(x3, weight, bias, eps, view)
    else:
        mean, var, count = merged_statistics(x3, comm)
        rstd = reciprocal_std(var, eps)
        y = kernels.batch_norm_apply(x3, mean, rstd, weight, bias, view)
    cache = BatchNormCache(x, weight, bias, mean, var, rstd, count, axis, comm)
    return _array.deliver(y, x.shape, out, view), cache


# -- given statistics ------------------------------------------------------------------------------------------


def batch_norm_frozen(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Batch norm with given statistics; y alone. See `batch_norm_frozen_forward`; here `out=x` is allowed."""
    return _frozen_forward(x, mean, var, weight, bias, axis, eps, out, keep=False)[0]


def batch_norm_frozen_forward(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, FrozenBatchNormCache]:
    """Batch norm with given statistics (inference): y = (x - mean) / sqrt(var + eps) * weight + bias.

    Parameters
    ----------
    x : array (N, C, ...), float16, bfloat16, float32 or float64
    mean, var : array (C,), any of these dtypes
        Running statistics, as `update_running_stats` keeps them. A negative variance gives NaN.
    weight, bias, axis, eps, out
        As for `batch_norm_forward`. Nothing is communicated, and one value per channel is enough.

    Returns
    -------
    y : array like x
    cache : FrozenBatchNormCache
        For `batch_norm_frozen_backward`.

    Raises
    ------
    ValueError, TypeError
        As for `batch_norm_forward`.
    """
    return _frozen_forward(x, mean, var, weight, bias, axis, eps, out, keep=True)


def batch_norm_frozen_backward(dy: Array, cache: FrozenBatchNormCache, *, out: Array | None = None) -> AffineGradients:
    """Gradients of `batch_norm_frozen_forward`: dx = dy * weight * rstd, for the statistics do not depend on x.

    Parameters
    ----------
    dy : array, x's shape, any supported floating dtype
    cache : FrozenBatchNormCache
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
    function = "batch_norm_frozen_backward"
    _check.cache_of(function, cache, FrozenBatchNormCache)
    x, weight, bias, mean, rstd, axis = cache
    made = kernels.batch_norm_frozen_backward_apply.direct(dy, x, weight, bias, mean, rstd, axis, out)
    if made is not None:
        return AffineGradients(*made)
    check_backward(function, dy, x, out, needed=(x, weight, bias, mean, rstd))
    shape = _array.channel_view(x.shape, axis)
    xp = _array.array_namespace(x)
    dy3, x3 = xp.reshape(dy, shape), xp.reshape(x, shape)
    sums = kernels.batch_norm_backward_reduce(dy3, x3, mean, rstd)
    view = _array.out_view(out, shape)
    dx = kernels.batch_norm_frozen_backward_apply(dy3, x3, rstd, weight, view)
    return AffineGradients(
        _array.deliver(dx, x.shape, out, view), *parameter_gradients(x, (weight, sums[1]), (bias, sums[0]))
    )


def _frozen_forward(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    axis: int,
    eps: float,
    out: Array | None,
    *,
    keep: bool,
) -> tuple[Array, FrozenBatchNormCache]:
    function = "batch_norm_frozen"
    made = kernels.batch_norm_apply.direct(x, mean, var, weight, bias, axis, eps, out)
    if made is not None:
        y, kept = made
        return y, FrozenBatchNormCache._make(kept)
    axis, eps = check_channels(function, x, weight, bias, axis, eps)
    check_statistics(function, x, mean, var, axis)
    check_output(function, out, x, (mean, var, weight, bias), keep=keep)
    mean, rstd = frozen_statistics(mean, var, eps)
    shape = _array.channel_view(x.shape, axis)
    view = _array.out_view(out, shape)
    x3 = _array.array_namespace(x).reshape(x, shape)
    y = kernels.batch_norm_apply(x3, mean, rstd, weight, bias, view)
    return _array.deliver(y, x.shape, out, view), FrozenBatchNormCache(x, weight, bias, mean, rstd, axis)
