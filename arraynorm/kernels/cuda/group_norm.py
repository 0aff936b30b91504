"""Group norm on the GPU: a group is one row where it lies together and fits on the chip; else cut into parts."""

from __future__ import annotations

from typing import Any

from arraynorm.kernels.cuda import _loader, _steps
from arraynorm.kernels.cuda._steps import samples
from arraynorm.kernels.reference import group_norm as reference
from arraynorm.typing import Array


@reference.group_norm_forward.register("cupy")
def group_norm_forward(
    x: Array, num_groups: int, weight: Array | None, bias: Array | None, eps: float, out: Array | None
) -> Any:
    if not _steps.takes(x):
        return NotImplemented
    with _loader.on_device(x):
        y = _steps.like(x, out)
        mean, var, rstd = _steps.doubles(x, 3, x.shape[0], num_groups)
        _steps.forward(samples, x, x.shape[2] // num_groups, weight, bias, eps, y, mean, var, rstd)
    return y, mean, var, rstd


@reference.group_norm_backward.register("cupy")
def group_norm_backward(dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx = _steps.like(x, out)
        dweight, dbias = _steps.grouped_backward(
            dy, x, x.shape[2] // mean.shape[1], _steps.statistic(mean), _steps.statistic(rstd), weight, dx
        )
    return dx, dweight, dbias
