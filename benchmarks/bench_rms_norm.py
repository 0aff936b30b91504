"""RMS norm over the last dimension. The weight is in x's dtype: with another, torch takes a slow path."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

import arraynorm as an
from cases import EPS, Case, Competitor, Data, every, first, with_dtypes

_Case = partial(Case, "rms_norm")
SHAPES = ((4096, 768), (8192, 4096))
CASES = with_dtypes(case for shape in SHAPES for case in (_Case("forward", shape), _Case("backward", shape, read=2)))


def with_arraynorm(d: Data) -> Mapping[str, Competitor]:
    given = (d.x, d.x.shape[1], d.weight.astype(d.x.dtype))
    if d.case.op == "forward":
        return {
            "arraynorm": Competitor(lambda: an.rms_norm_forward(*given, eps=EPS), first),
            "arraynorm out=": Competitor(lambda: an.rms_norm_forward(*given, eps=EPS, out=d.out), first),
        }
    cache = an.rms_norm_forward(*given, eps=EPS)[1]
    return {
        "arraynorm": Competitor(lambda: an.rms_norm_backward(d.dy, cache), every),
        "arraynorm out=": Competitor(lambda: an.rms_norm_backward(d.dy, cache, out=d.out), every),
    }


def with_torch(d: Data) -> Mapping[str, Competitor]:
    """The backward is autograd's, of a graph made once: torch has no operator for it on the CPU."""
    import torch

    from torch_arrays import alone, tensors
    from torch_arrays import every as every_tensor

    x, dy, w = tensors(d, "x", "dy", "weight")
    w = w.to(x.dtype)
    shape = [x.shape[1]]
    if d.case.op == "forward":
        return {"torch": Competitor(lambda: torch.rms_norm(x, shape, w, EPS), alone(d))}
    with torch.enable_grad():
        x.requires_grad_(), w.requires_grad_()
        y = torch.rms_norm(x, shape, w, EPS)
    return {"torch": Competitor(lambda: torch.autograd.grad(y, (x, w), dy, retain_graph=True), every_tensor(d))}


def with_numpy(d: Data) -> Mapping[str, Competitor]:
    """In float32, whatever x is."""
    w = d.weight

    def forward():
        x = d.x.astype(np.float32, copy=False)
        rstd = 1 / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(EPS))
        return ((x * rstd * w).astype(d.x.dtype, copy=False),)

    def backward():
        x, dy = d.x.astype(np.float32, copy=False), d.dy.astype(np.float32, copy=False)
        x_hat = x * rstd
        g = dy * w
        dx = (g - x_hat * (g * x_hat).mean(1, keepdims=True)) * rstd
        return dx.astype(d.x.dtype, copy=False), (dy * x_hat).sum(0)

    if d.case.op == "forward":
        return {"numpy": Competitor(forward, every)}
    wide = d.x.astype(np.float32, copy=False)
    rstd = 1 / np.sqrt((wide * wide).mean(1, keepdims=True) + np.float32(EPS))
    return {"numpy": Competitor(backward, every)}


def with_numba(d: Data) -> Mapping[str, Competitor]:
    if d.case.dtype != "float32":
        return {}
    from numba_kernels import row_norm as kernels

    x, w, rstd, dweight = d.x, d.weight, np.empty(len(d.x), np.float32), np.empty_like(d.weight)
    run = partial(kernels.rms_forward.variant(x.size), x, w, EPS, d.out, rstd)
    if d.case.op == "forward":
        return {"numba": Competitor(run, lambda _: (d.out,))}
    run()  # for rstd
    back = partial(kernels.rms_backward.variant(x.size), x, d.dy, rstd, w, d.out, dweight)
    return {"numba": Competitor(back, lambda _: (d.out, dweight))}
