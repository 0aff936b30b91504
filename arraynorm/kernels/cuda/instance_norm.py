"""Instance norm on the GPU: group norm with one channel to a group, and a backward in one reading where that fits."""

from __future__ import annotations

from typing import Any

from arraynorm.kernels.cuda import _loader, _steps
from arraynorm.kernels.cuda._steps import samples
from arraynorm.kernels.reference import instance_norm as reference
from arraynorm.typing import Array


@reference.instance_norm_forward.register("cupy")
def instance_norm_forward(x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None) -> Any:
    if not _steps.takes(x):
        return NotImplemented
    with _loader.on_device(x):
        y = _steps.like(x, out)
        mean, var, rstd = _steps.doubles(x, 3, x.shape[0], x.shape[2])
        _steps.forward(samples, x, 1, weight, bias, eps, y, mean, var, rstd)
    return y, mean, var, rstd


@reference.instance_norm_backward.register("cupy")
def instance_norm_backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None
) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx = _steps.like(x, out)
        mean, rstd = _steps.statistic(mean), _steps.statistic(rstd)
        if not _steps.reads_once(samples, x, dy, dx, 1, 2):
            dweight, dbias = _steps.grouped_backward(dy, x, 1, mean, rstd, weight, dx)
            return dx, dweight, dbias
        n, _, c, _ = x.shape
        sums, gradients = _steps.doubles(x, 2, n, c), _steps.doubles(x, 2, c)
        _steps.slab_backward(samples, dy, x, mean, rstd, weight, dx, sums)
        _steps.sum_columns(sums, n, c, c, n * c, gradients)
    return dx, gradients[1, :], gradients[0, :]
