"""Batch norm on the GPU: one launch where a channel fits on the chip, two otherwise."""

from __future__ import annotations

from typing import Any

from arraynorm.kernels.cuda import _loader, _steps
from arraynorm.kernels.cuda._steps import Statistics, channels
from arraynorm.kernels.reference import batch_norm as reference
from arraynorm.typing import Array


@reference.batch_norm_stats.register("cupy")
def batch_norm_stats(x: Array) -> Any:
    if not _steps.takes(x):
        return NotImplemented
    with _loader.on_device(x):
        mean, m2 = _steps.doubles(x, 2, x.shape[1])
        _steps.moments(channels, x, 1, 0.0, Statistics(mean=mean, m2=m2))
    return mean, m2


@reference.batch_norm_apply.register("cupy")
def batch_norm_apply(
    x: Array, mean: Array, rstd: Array, weight: Array | None, bias: Array | None, out: Array | None
) -> Any:
    if not _steps.takes(x):
        return NotImplemented
    with _loader.on_device(x):
        y = _steps.like(x, out)
        _steps.apply(channels, x, 1, _steps.statistic(mean), _steps.statistic(rstd), weight, bias, y)
    return y


@reference.batch_norm_forward.register("cupy")
def batch_norm_forward(x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None) -> Any:
    if not _steps.takes(x):
        return NotImplemented
    with _loader.on_device(x):
        y = _steps.like(x, out)
        mean, var, rstd = _steps.doubles(x, 3, x.shape[1])
        _steps.forward(channels, x, 1, weight, bias, eps, y, mean, var, rstd)
    return y, mean, var, rstd


@reference.batch_norm_backward_reduce.register("cupy")
def batch_norm_backward_reduce(dy: Array, x: Array, mean: Array, rstd: Array) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        sums = _steps.doubles(x, 2, x.shape[1])
        _steps.products(channels, dy, x, 1, _steps.statistic(mean), _steps.statistic(rstd), None, sums, None)
    return sums[0, :], sums[1, :]


@reference.batch_norm_backward_apply.register("cupy")
def batch_norm_backward_apply(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    mean_dy: Array,
    mean_dy_x_hat: Array,
    out: Array | None,
) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx = _steps.like(x, out)
        given = (_steps.statistic(mean), _steps.statistic(rstd), weight, _steps.pair(mean_dy, mean_dy_x_hat))
        _steps.dx(channels, dy, x, 1, *given, dx)
    return dx


@reference.batch_norm_frozen_backward_apply.register("cupy")
def batch_norm_frozen_backward_apply(dy: Array, x: Array, rstd: Array, weight: Array | None, out: Array | None) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx = _steps.like(x, out)
        _steps.dx(channels, dy, None, 1, None, _steps.statistic(rstd), weight, None, dx)
    return dx


@reference.batch_norm_backward.register("cupy")
def batch_norm_backward(dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx = _steps.like(x, out)
        mean, rstd = _steps.statistic(mean), _steps.statistic(rstd)
        sums = _steps.doubles(x, 2, x.shape[1])
        if _steps.reads_once(channels, x, dy, dx, 1, 2):
            _steps.slab_backward(channels, dy, x, mean, rstd, weight, dx, sums)
        else:
            means = _steps.doubles(x, 2, x.shape[1])
            _steps.products(channels, dy, x, 1, mean, rstd, None, sums, means)
            _steps.dx(channels, dy, x, 1, mean, rstd, weight, means, dx)
    return dx, sums[1, :], sums[0, :]
