"""RMS norm on the GPU: layer norm's kernels without the mean."""

from __future__ import annotations

from typing import Any

from arraynorm.kernels.cuda import _loader, _steps
from arraynorm.kernels.cuda._steps import Statistics, rows
from arraynorm.kernels.reference import rms_norm as reference
from arraynorm.typing import Array


@reference.rms_norm_forward.register("cupy")
def rms_norm_forward(x: Array, weight: Array | None, eps: float, out: Array | None) -> Any:
    if not _steps.takes(x):
        return NotImplemented
    with _loader.on_device(x):
        y, rstd = _steps.like(x, out), _steps.doubles(x, x.shape[0])
        _steps.row_forward(rows, x, x.shape[1], weight, None, eps, y, Statistics(rstd=rstd), centered=False)
    return y, rstd


@reference.rms_norm_backward.register("cupy")
def rms_norm_backward(dy: Array, x: Array, rstd: Array, weight: Array | None, out: Array | None) -> Any:
    if not _steps.takes(x, dy):
        return NotImplemented
    with _loader.on_device(x):
        dx = _steps.like(x, out)
        dweight, _ = _steps.row_backward(dy, x, None, _steps.statistic(rstd), weight, dx)
    return dx, dweight
