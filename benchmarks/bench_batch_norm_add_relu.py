"""Batch norm, plus an addend, then ReLU. torch adds and clamps in place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

import arraynorm as an
from cases import EPS, Case, Competitor, Data, every, first, with_dtypes

_Case = partial(Case, "batch_norm_add_relu")
SHAPE, LARGE = (32, 64, 56, 56), (64, 64, 112, 112)


def _pair(shape: tuple[int, ...], **options: frozenset[str]) -> list[Case]:
    """x and addend -> y; dy and x -> dx and daddend."""
    return [_Case("forward", shape, read=2, **options), _Case("backward", shape, read=2, written=2, **options)]


CASES = [*with_dtypes(_pair(SHAPE)), *_pair(LARGE, tags=frozenset({"large"}))]


def with_arraynorm(d: Data) -> Mapping[str, Competitor]:
    given = (d.x, d.addend, d.weight, d.bias)
    if d.case.op == "forward":
        return {
            "arraynorm": Competitor(lambda: an.batch_norm_add_relu_forward(*given), first),
            "arraynorm out=": Competitor(lambda: an.batch_norm_add_relu_forward(*given, out=d.out), first),
        }
    cache = an.batch_norm_add_relu_forward(*given)[1]
    out = (d.out, d.out2)
    return {
        "arraynorm": Competitor(lambda: an.batch_norm_add_relu_backward(d.dy, cache), every),
        "arraynorm out=": Competitor(lambda: an.batch_norm_add_relu_backward(d.dy, cache, out=out), every),
    }


def with_torch(d: Data) -> Mapping[str, Competitor]:
    import torch

    from torch_arrays import aten, tensors
    from torch_arrays import every as every_tensor
    from torch_arrays import first as first_tensor

    x, addend, w, b = tensors(d, "x", "addend", "weight", "bias")
    y, dz = torch.empty_like(x), torch.empty_like(x)
    given, saved = (x, w, b, None, None, True, 0.1, EPS), (torch.empty(0), torch.empty(0))

    def forward(**out):
        raw = torch.native_batch_norm(*given, **out)
        raw[0].add_(addend).relu_()
        return raw

    if d.case.op == "forward":
        return {
            "torch": Competitor(forward, first_tensor(d)),
            "torch out=": Competitor(lambda: forward(out=(y, *saved)), first_tensor(d)),
        }
    _, mean, rstd = forward(out=(y, *saved))
    (dy,) = tensors(d, "dy")

    def backward():
        """The ReLU's gradient goes to memory that is there already."""
        aten.threshold_backward.grad_input(dy, y, 0, grad_input=dz)
        dx, dweight, dbias = aten.native_batch_norm_backward.default(
            dz, x, w, None, None, mean, rstd, True, EPS, [True] * 3
        )
        return dx, dz, dweight, dbias

    return {"torch": Competitor(backward, every_tensor(d))}


def with_numpy(d: Data) -> Mapping[str, Competitor]:
    """In float32, whatever x is."""
    w, b = d.weight.reshape(-1, 1, 1), d.bias.reshape(-1, 1, 1)
    others = (0, 2, 3)

    def moments(x):
        return x.mean(others, keepdims=True), 1 / np.sqrt(x.var(others, keepdims=True) + np.float32(EPS))

    def forward():
        x = d.x.astype(np.float32, copy=False)
        mean, rstd = moments(x)
        return (np.maximum((x - mean) * rstd * w + b + d.addend, 0).astype(d.x.dtype, copy=False),)

    def backward():
        x = d.x.astype(np.float32, copy=False)
        dz = np.where(positive, d.dy, np.zeros((), d.dy.dtype))
        g = dz.astype(np.float32, copy=False)
        x_hat = (x - mean) * rstd
        dweight, dbias = (g * x_hat).sum(others, keepdims=True), g.sum(others, keepdims=True)
        n = x.size // w.size
        dx = (g - dbias / n - x_hat * (dweight / n)) * (w * rstd)
        return dx.astype(d.x.dtype, copy=False), dz, dweight.ravel(), dbias.ravel()

    if d.case.op == "forward":
        return {"numpy": Competitor(forward, every)}
    mean, rstd = moments(d.x.astype(np.float32, copy=False))
    positive = forward()[0] > 0
    return {"numpy": Competitor(backward, every)}


def with_numba(d: Data) -> Mapping[str, Competitor]:
    if d.case.dtype != "float32":
        return {}
    from numba_kernels import batch_norm as kernels

    planes = (*d.case.shape[:2], -1)
    x, addend, dy, y, dx = (a.reshape(planes) for a in (d.x, d.addend, d.dy, d.out, d.out2))
    w, b, daddend = d.weight, d.bias, np.empty_like(x)
    mean, rstd, dweight, dbias = (np.empty_like(w) for _ in range(4))
    forward = kernels.add_relu_forward.variant(x.size)
    backward = kernels.add_relu_backward.variant(x.size)
    run = partial(forward, x, addend, w, b, EPS, y, mean, rstd)
    if d.case.op == "forward":
        return {"numba": Competitor(run, lambda _: (d.out,))}
    y = np.empty_like(x)  # a cache of its own, for the others write to `out`
    forward(x, addend, w, b, EPS, y, mean, rstd)
    back = partial(backward, x, dy, y, mean, rstd, w, dx, daddend, dweight, dbias)
    return {"numba": Competitor(back, lambda _: (d.out2, daddend.reshape(d.x.shape), dweight, dbias))}
