"""Batch norm + addend + ReLU on the GPU: two launches, the mask of one bit per element written with y."""

from __future__ import annotations

from typing import Any

from arraynorm.kernels.cuda import _loader, _steps
from arraynorm.kernels.cuda._steps import Statistics, channels
from arraynorm.kernels.reference import batch_norm_add_relu as reference
from arraynorm.typing import Array


@reference.batch_norm_add_relu_apply.register("cupy")
def batch_norm_add_relu_apply(
    x: Array,
    addend: Array | None,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array | None,
) -> Any:
    if not _steps.takes(x, addend):
        return NotImplemented
    with _loader.on_device(x):
        y, mask = _steps.like(x, out), _steps.mask(x)
        given = (_steps.statistic(mean), _steps.statistic(rstd), weight, bias)
        _steps.apply(channels, x, 1, *given, y, addend=addend, mask=mask)
    return y, mask


@reference.batch_norm_add_relu_forward.register("cupy")
def batch_norm_add_relu_forward(
    x: Array, addend: Array | None, weight: Array | None, bias: Array | None, eps: float, out: Array | None
) -> Any:
    if not _steps.takes(x, addend):
        return NotImplemented
    with _loader.on_device(x):
        y, mask = _steps.like(x, out), _steps.mask(x)
        mean, var, rstd = _steps.doubles(x, 3, x.shape[1])
        _steps.moments(channels, x, 1, eps, Statistics(mean=mean, var=var, rstd=rstd))
        _steps.apply(channels, x, 1, mean, rstd, weight, bias, y, addend=addend, mask=mask)
    return y, mask, mean, var, rstd


@reference.batch_norm_add_relu_backward_reduce.register("cupy")
def batch_norm_add_relu_backward_reduce(dy: Array, mask: Array, x: Array, mean: Array, rstd: Array) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        sums = _steps.doubles(x, 2, x.shape[1])
        given = (_steps.statistic(mean), _steps.statistic(rstd), None)
        _steps.products(channels, dy, x, 1, *given, sums, None, mask=mask)
    return sums[0, :], sums[1, :]


@reference.batch_norm_add_relu_backward_apply.register("cupy")
def batch_norm_add_relu_backward_apply(
    dy: Array,
    mask: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    mean_g: Array,
    mean_g_x_hat: Array,
    with_addend: bool,
    out: Array | None,
    out_addend: Array | None,
) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx, daddend = _outputs(x, with_addend, out, out_addend)
        given = (_steps.statistic(mean), _steps.statistic(rstd), weight, _steps.pair(mean_g, mean_g_x_hat))
        _steps.dx(channels, dy, x, 1, *given, dx, mask=mask, daddend=daddend)
    return dx, daddend


@reference.batch_norm_add_relu_frozen_backward_apply.register("cupy")
def batch_norm_add_relu_frozen_backward_apply(
    dy: Array,
    mask: Array,
    x: Array,
    rstd: Array,
    weight: Array | None,
    with_addend: bool,
    out: Array | None,
    out_addend: Array | None,
) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx, daddend = _outputs(x, with_addend, out, out_addend)
        given = (None, _steps.statistic(rstd), weight, None)
        _steps.dx(channels, dy, None, 1, *given, dx, mask=mask, daddend=daddend)
    return dx, daddend


@reference.batch_norm_add_relu_backward.register("cupy")
def batch_norm_add_relu_backward(
    dy: Array,
    mask: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    with_addend: bool,
    out: Array | None,
    out_addend: Array | None,
) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx, daddend = _outputs(x, with_addend, out, out_addend)
        mean, rstd = _steps.statistic(mean), _steps.statistic(rstd)
        sums, means = _steps.doubles(x, 2, 2, x.shape[1])
        _steps.products(channels, dy, x, 1, mean, rstd, None, sums, means, mask=mask)
        _steps.dx(channels, dy, x, 1, mean, rstd, weight, means, dx, mask=mask, daddend=daddend)
    return dx, daddend, sums[1, :], sums[0, :]


def _outputs(x: Array, with_addend: bool, out: Array | None, out_addend: Array | None) -> tuple[Array, Array | None]:
    return _steps.like(x, out), _steps.like(x, out_addend) if with_addend else None
