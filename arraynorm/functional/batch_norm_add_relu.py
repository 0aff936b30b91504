"""Batch norm + add + ReLU: the tail of a residual block, with batch statistics or given ones."""

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
from arraynorm.kernels.reference import batch_norm_add_relu as kernels
from arraynorm.kernels.reference.moments import reciprocal_std
from arraynorm.typing import AddReluGradients, Array, Communicator

Out = Array | tuple[Array | None, Array | None] | None
"""dx, or (dx, daddend), as NumPy's ufuncs with two results."""


class BatchNormAddReluCache(NamedTuple):
    """What `batch_norm_add_relu_backward` needs. It refers to x and weight and copies neither; y is not needed."""

    x: Array
    weight: Array | None
    bias: Array | None
    has_addend: bool
    mean: Array
    """(C,) float64: mean over all ranks."""
    var: Array
    """(C,) float64: **biased** variance over all ranks."""
    rstd: Array
    """(C,) float64: 1 / sqrt(var + eps)."""
    mask: Array
    """(ceil(x.size / 8),) uint8: where y > 0; little-endian bits in C order of the (N, C, S) view, zero-padded."""
    n: int
    """Values per channel over all ranks."""
    axis: int
    comm: Communicator | None

    def to(self, xp: ModuleType) -> BatchNormAddReluCache:
        """The same cache with its arrays in the library `xp` (numpy, cupy, ...)."""
        return BatchNormAddReluCache(*_array.moved_fields(self, xp))


class FrozenBatchNormAddReluCache(NamedTuple):
    """What `batch_norm_add_relu_frozen_backward` needs; fields as in BatchNormAddReluCache."""

    x: Array
    weight: Array | None
    bias: Array | None
    has_addend: bool
    mean: Array
    rstd: Array
    mask: Array
    axis: int

    def to(self, xp: ModuleType) -> FrozenBatchNormAddReluCache:
        """The same cache with its arrays in the library `xp` (numpy, cupy, ...)."""
        return FrozenBatchNormAddReluCache(*_array.moved_fields(self, xp))


# -- batch statistics ------------------------------------------------------------------------------------------


def batch_norm_add_relu(
    x: Array,
    addend: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    comm: Communicator | None = None,
    out: Array | None = None,
) -> Array:
    """Batch norm + add + ReLU; y alone. See `batch_norm_add_relu_forward`; here `out=x` is allowed."""
    return _forward(x, addend, weight, bias, axis, eps, comm, out, keep=False)[0]


def batch_norm_add_relu_forward(
    x: Array,
    addend: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    comm: Communicator | None = None,
    out: Array | None = None,
) -> tuple[Array, BatchNormAddReluCache]:
    """Batch norm + add + ReLU: y = max(batch_norm(x) + addend, 0).

    Parameters
    ----------
    x : array (N, C, ...), float16, bfloat16, float32 or float64
    addend : array, x's shape, any of these dtypes, optional
        None is 0.
    weight, bias, axis, eps, comm
        As for `batch_norm_forward`.
    out : array like x, optional
        Receives y (NumPy and CuPy). `out=addend` is allowed; `out=x` is not, for the cache refers to x.

    Returns
    -------
    y : array like x
    cache : BatchNormAddReluCache
        For `batch_norm_add_relu_backward` and `update_running_stats`: one bit per element, where y > 0.

    Raises
    ------
    ValueError, TypeError, SyncMismatchError
        As for `batch_norm_forward`.

    References
    ----------
    He, Zhang, Ren & Sun, "Deep Residual Learning", 2015, https://arxiv.org/abs/1512.03385
    """
    return _forward(x, addend, weight, bias, axis, eps, comm, out, keep=True)


def batch_norm_add_relu_backward(dy: Array, cache: BatchNormAddReluCache, *, out: Out = None) -> AddReluGradients:
    """Gradients of `batch_norm_add_relu_forward`: with g = dy where y > 0, else 0 (also at the kink, y = 0),
    daddend = g, and dx, dweight, dbias are batch norm's for g.

    Parameters
    ----------
    dy : array, x's shape, any supported floating dtype
    cache : BatchNormAddReluCache
    out : array like x, or a tuple of two, optional
        Receives dx, or (dx, daddend), of which either may be None. Each may be dy, not both.

    Returns
    -------
    AddReluGradients
        daddend is None where the forward had no addend. dweight and dbias are this rank's sums.

    Raises
    ------
    ValueError, TypeError
        As for the forward; with a communicator they become a SyncMismatchError on every rank.
    """
    function = "batch_norm_add_relu_backward"
    _check.cache_of(function, cache, BatchNormAddReluCache)
    x, weight, bias, has_addend, mean, var, rstd, mask, count, axis, comm = cache
    if comm is None and out is None:
        made = kernels.batch_norm_add_relu_backward.direct(dy, x, weight, bias, has_addend, mean, var, rstd, mask, axis)
        if made is not None:
            return AddReluGradients(*made)
    with agreement(comm) as fields:
        out, out_addend = _check_backward(function, dy, cache, out)
        fields.update(operation=function, channels=mean.shape[0], dtype=_array.dtype_name(x.dtype), ndim=x.ndim)
    shape = _array.channel_view(x.shape, axis)
    xp = _array.array_namespace(x)
    dy3, x3 = xp.reshape(dy, shape), xp.reshape(x, shape)
    view, view_addend = _array.out_view(out, shape), _array.out_view(out_addend, shape)
    if comm is None:
        dx, daddend, dweight, dbias = kernels.batch_norm_add_relu_backward(
            dy3, mask, x3, mean, rstd, weight, has_addend, view, view_addend
        )
    else:
        dbias, dweight = kernels.batch_norm_add_relu_backward_reduce(dy3, mask, x3, mean, rstd)
        means = global_means((dbias, dweight), count, comm)
        dx, daddend = kernels.batch_norm_add_relu_backward_apply(
            dy3, mask, x3, mean, rstd, weight, *means, has_addend, view, view_addend
        )
    return AddReluGradients(
        _array.deliver(dx, x.shape, out, view),
        None if daddend is None else _array.deliver(daddend, x.shape, out_addend, view_addend),
        *parameter_gradients(x, (weight, dweight), (bias, dbias)),
    )


def _forward(
    x: Array,
    addend: Array | None,
    weight: Array | None,
    bias: Array | None,
    axis: int,
    eps: float,
    comm: Communicator | None,
    out: Array | None,
    *,
    keep: bool,
) -> tuple[Array, BatchNormAddReluCache]:
    function = "batch_norm_add_relu"
    if comm is None and out is None:
        made = kernels.batch_norm_add_relu_forward.direct(x, addend, weight, bias, axis, eps)
        if made is not None:
            y, kept = made
            return y, BatchNormAddReluCache._make(kept)
    _check.communicator(function, comm)
    with agreement(comm) as fields:
        axis, eps = check_channels(function, x, weight, bias, axis, eps)
        _check.optional_companion(function, x, "addend", addend, tuple(x.shape))
        check_output(function, out, x, (weight, bias), keep=keep, may_be=(addend,))
        fields.update(forward_fields(function, x, weight, bias, axis, eps, keep))
    shape = _array.channel_view(x.shape, axis)
    xp = _array.array_namespace(x)
    x3 = xp.reshape(x, shape)
    addend3 = None if addend is None else xp.reshape(addend, shape)
    view = _array.out_view(out, shape)
    if comm is None:
        count = local_count(x3, x.shape)
        y, mask, mean, var, rstd = kernels.batch_norm_add_relu_forward(x3, addend3, weight, bias, eps, view)
    else:
        mean, var, count = merged_statistics(x3, comm)
        rstd = reciprocal_std(var, eps)
        y, mask = kernels.batch_norm_add_relu_apply(x3, addend3, mean, rstd, weight, bias, view)
    cache = BatchNormAddReluCache(x, weight, bias, addend is not None, mean, var, rstd, mask, count, axis, comm)
    return _array.deliver(y, x.shape, out, view), cache


# -- given statistics ------------------------------------------------------------------------------------------


def batch_norm_add_relu_frozen(
    x: Array,
    addend: Array | None,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Batch norm with given statistics + add + ReLU; y alone. `out=x` and `out=addend` are allowed."""
    return _frozen_forward(x, addend, mean, var, weight, bias, axis, eps, out, keep=False)[0]


def batch_norm_add_relu_frozen_forward(
    x: Array,
    addend: Array | None,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, FrozenBatchNormAddReluCache]:
    """Batch norm with given statistics + add + ReLU (inference): y = max(batch_norm_frozen(x) + addend, 0).

    Parameters
    ----------
    x, addend, weight, bias, axis, eps, out
        As for `batch_norm_add_relu_forward`.
    mean, var : array (C,)
        Running statistics.

    Returns
    -------
    y : array like x
    cache : FrozenBatchNormAddReluCache
        For `batch_norm_add_relu_frozen_backward`.

    Raises
    ------
    ValueError, TypeError
        As for `batch_norm_forward`.
    """
    return _frozen_forward(x, addend, mean, var, weight, bias, axis, eps, out, keep=True)


def batch_norm_add_relu_frozen_backward(
    dy: Array, cache: FrozenBatchNormAddReluCache, *, out: Out = None
) -> AddReluGradients:
    """Gradients of `batch_norm_add_relu_frozen_forward`: as `batch_norm_add_relu_backward`, but dx = weight * rstd * g.

    Parameters
    ----------
    dy : array, x's shape, any supported floating dtype
    cache : FrozenBatchNormAddReluCache
    out : array like x, or a tuple of two, optional
        Receives dx, or (dx, daddend), of which either may be None. Each may be dy, not both.

    Returns
    -------
    AddReluGradients

    Raises
    ------
    ValueError, TypeError
        As for the forward.
    """
    function = "batch_norm_add_relu_frozen_backward"
    _check.cache_of(function, cache, FrozenBatchNormAddReluCache)
    x, weight, bias, has_addend, mean, rstd, mask, axis = cache
    kernel = kernels.batch_norm_add_relu_frozen_backward_apply
    if out is None:
        made = kernel.direct(dy, x, weight, bias, has_addend, mean, rstd, mask, axis)
        if made is not None:
            return AddReluGradients(*made)
    out, out_addend = _check_backward(function, dy, cache, out)
    shape = _array.channel_view(x.shape, axis)
    xp = _array.array_namespace(x)
    dy3, x3 = xp.reshape(dy, shape), xp.reshape(x, shape)
    sums = kernels.batch_norm_add_relu_backward_reduce(dy3, mask, x3, mean, rstd)
    view, view_addend = _array.out_view(out, shape), _array.out_view(out_addend, shape)
    dx, daddend = kernel(dy3, mask, x3, rstd, weight, has_addend, view, view_addend)
    return AddReluGradients(
        _array.deliver(dx, x.shape, out, view),
        None if daddend is None else _array.deliver(daddend, x.shape, out_addend, view_addend),
        *parameter_gradients(x, (weight, sums[1]), (bias, sums[0])),
    )


def _frozen_forward(
    x: Array,
    addend: Array | None,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    axis: int,
    eps: float,
    out: Array | None,
    *,
    keep: bool,
) -> tuple[Array, FrozenBatchNormAddReluCache]:
    function = "batch_norm_add_relu_frozen"
    if out is None:
        made = kernels.batch_norm_add_relu_apply.direct(x, addend, mean, var, weight, bias, axis, eps)
        if made is not None:
            y, kept = made
            return y, FrozenBatchNormAddReluCache._make(kept)
    axis, eps = check_channels(function, x, weight, bias, axis, eps)
    check_statistics(function, x, mean, var, axis)
    _check.optional_companion(function, x, "addend", addend, tuple(x.shape))
    check_output(function, out, x, (mean, var, weight, bias), keep=keep, may_be=(addend,))
    mean, rstd = frozen_statistics(mean, var, eps)
    shape = _array.channel_view(x.shape, axis)
    xp = _array.array_namespace(x)
    addend3 = None if addend is None else xp.reshape(addend, shape)
    view = _array.out_view(out, shape)
    y, mask = kernels.batch_norm_add_relu_apply(xp.reshape(x, shape), addend3, mean, rstd, weight, bias, view)
    cache = FrozenBatchNormAddReluCache(x, weight, bias, addend is not None, mean, rstd, mask, axis)
    return _array.deliver(y, x.shape, out, view), cache


# -- checks ----------------------------------------------------------------------------------------------------


def _check_backward(
    function: str, dy: Array, cache: BatchNormAddReluCache | FrozenBatchNormAddReluCache, out: Out
) -> tuple[Array | None, Array | None]:
    """The checks of both backwards; `out` as the pair (dx, daddend)."""
    pair = out if isinstance(out, tuple) else (out, None)
    if len(pair) != 2:
        raise ValueError(f"{function}: out must be an array or a tuple (dx, daddend), got {len(pair)} entries")
    needed = tuple(field for field in cache if _array.is_array(field))
    dx, daddend = pair
    if daddend is not None and not cache.has_addend:
        raise ValueError(f"{function}: out must be dx alone where the forward had no addend, got (dx, daddend)")
    check_backward(function, dy, cache.x, dx, needed=needed)
    _check.output(function, "out", daddend, cache.x, apart_from=(*needed, dx), may_be=(dy,))
    return dx, daddend
