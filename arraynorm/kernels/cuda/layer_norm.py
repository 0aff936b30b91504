"""Layer norm on the GPU: a team of threads to a row; one launch forward, two backward."""

from __future__ import annotations

from typing import Any

from arraynorm.kernels.cuda import _loader, _steps
from arraynorm.kernels.cuda._steps import Statistics, rows
from arraynorm.kernels.reference import layer_norm as reference
from arraynorm.typing import Array


@reference.layer_norm_forward.register("cupy")
def layer_norm_forward(x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None) -> Any:
    if not _steps.takes(x):
        return NotImplemented
    with _loader.on_device(x):
        y = _steps.like(x, out)
        mean, rstd = _steps.doubles(x, 2, x.shape[0])
        _steps.row_forward(rows, x, x.shape[1], weight, bias, eps, y, Statistics(mean=mean, rstd=rstd))
    return y, mean, rstd


@reference.layer_norm_backward.register("cupy")
def layer_norm_backward(dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx = _steps.like(x, out)
        sums = _steps.row_backward(dy, x, _steps.statistic(mean), _steps.statistic(rstd), weight, dx)
    return dx, *sums
