"""What the norms over rows have in common: the formulas in NumPy, and numba's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from cases import EPS, Competitor, Data, every


def with_numpy(
    d: Data, view: tuple[int, ...], axes: tuple[int, ...], parameter: tuple[int, ...]
) -> Mapping[str, Competitor]:
    """x as `view`, normalized over `axes`; weight and bias as `parameter`. In float32, whatever x is."""
    w, b = d.weight.reshape(parameter), d.bias.reshape(parameter)
    shared = tuple(i for i in range(len(view)) if parameter[i] == 1)

    def wide(a: Any) -> Any:
        return a.reshape(view).astype(np.float32, copy=False)

    def moments(x):
        return x.mean(axes, keepdims=True), 1 / np.sqrt(x.var(axes, keepdims=True) + np.float32(EPS))

    def narrow(a: Any) -> Any:
        return a.reshape(d.x.shape).astype(d.x.dtype, copy=False)

    def forward():
        x = wide(d.x)
        mean, rstd = moments(x)
        return (narrow((x - mean) * rstd * w + b),)

    def backward():
        x, dy = wide(d.x), wide(d.dy)
        x_hat = (x - mean) * rstd
        g = dy * w
        dx = (g - g.mean(axes, keepdims=True) - x_hat * (g * x_hat).mean(axes, keepdims=True)) * rstd
        return narrow(dx), (dy * x_hat).sum(shared).ravel(), dy.sum(shared).ravel()

    if d.case.op == "forward":
        return {"numpy": Competitor(forward, every)}
    mean, rstd = moments(wide(d.x))
    return {"numpy": Competitor(backward, every)}


def with_numba(d: Data, row: int, period: int, spatial: int) -> Mapping[str, Competitor]:
    """Rows of `row` elements; their parameters repeat after `period` rows; one covers `spatial` elements."""
    if d.case.dtype != "float32":
        return {}
    from numba_kernels import row_norm as kernels

    x, dy, out = (a.reshape(-1, row) for a in (d.x, d.dy, d.out))
    w, b = d.weight, d.bias
    mean, rstd = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    dweight, dbias = np.empty_like(w), np.empty_like(b)
    run = partial(kernels.forward.variant(x.size), x, period, spatial, w, b, EPS, out, mean, rstd)
    if d.case.op == "forward":
        return {"numba": Competitor(run, lambda _: (d.out,))}
    run()  # for mean and rstd
    backward = kernels.backward.variant(x.size)
    back = partial(backward, x, dy, period, spatial, mean, rstd, w, out, dweight, dbias)
    return {"numba": Competitor(back, lambda _: (d.out, dweight, dbias))}
