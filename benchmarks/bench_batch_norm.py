"""Batch norm: training forward and backward, and with given statistics."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

import arraynorm as an
from cases import EPS, Case, Competitor, Data, every, first, with_dtypes

SHAPES = ((32, 64, 56, 56), (32, 2048, 7, 7), (8, 32, 16, 64, 64), (256, 1024))
FIRST, LARGE, SMALL = SHAPES[0], (64, 64, 112, 112), (2, 8, 4, 4)

_Case = partial(Case, "batch_norm")
CASES = [
    *with_dtypes(case for shape in SHAPES for case in (_Case("forward", shape), _Case("backward", shape, read=2))),
    *with_dtypes(
        (_Case("forward", FIRST, layout="channels last"), _Case("backward", FIRST, layout="channels last", read=2))
    ),
    *with_dtypes((_Case("frozen forward", FIRST),)),
    _Case("frozen backward", FIRST, read=2, tags=frozenset()),
    *(_Case(op, LARGE, read=read, tags=frozenset({"large"})) for op, read in (("forward", 1), ("backward", 2))),
    *(_Case(op, SMALL, read=read, tags=frozenset({"small"})) for op, read in (("forward", 1), ("backward", 2))),
]


def with_arraynorm(d: Data) -> Mapping[str, Competitor]:
    x, w, b, axis = d.x, d.weight, d.bias, d.axis
    match d.case.op:
        case "forward":
            return {
                "arraynorm": Competitor(lambda: an.batch_norm_forward(x, w, b, axis=axis), first),
                "arraynorm out=": Competitor(lambda: an.batch_norm_forward(x, w, b, axis=axis, out=d.out), first),
            }
        case "frozen forward":
            given = (x, d.mean, d.var, w, b)
            return {
                "arraynorm": Competitor(lambda: an.batch_norm_frozen_forward(*given, axis=axis), first),
                "arraynorm out=": Competitor(lambda: an.batch_norm_frozen_forward(*given, axis=axis, out=d.out), first),
            }
        case "backward":
            backward, cache = an.batch_norm_backward, an.batch_norm_forward(x, w, b, axis=axis)[1]
        case _:
            backward = an.batch_norm_frozen_backward
            cache = an.batch_norm_frozen_forward(x, d.mean, d.var, w, b, axis=axis)[1]
    return {
        "arraynorm": Competitor(lambda: backward(d.dy, cache), every),
        "arraynorm out=": Competitor(lambda: backward(d.dy, cache, out=d.out), every),
    }


def with_torch(d: Data) -> Mapping[str, Competitor]:
    import torch

    from torch_arrays import aten, tensors
    from torch_arrays import every as every_tensor
    from torch_arrays import first as first_tensor

    x, w, b = tensors(d, "x", "weight", "bias")
    if d.case.op.startswith("frozen"):
        mean, var = tensors(d, "mean", "var")
        given = (x, w, b, mean, var, False, 0.1, EPS)
    else:
        mean = var = None
        given = (x, w, b, None, None, True, 0.1, EPS)
    if d.case.op.endswith("forward"):
        out = (tensors(d, "out")[0], torch.empty(0), torch.empty(0))
        return {
            "torch": Competitor(lambda: torch.native_batch_norm(*given), first_tensor(d)),
            "torch out=": Competitor(lambda: torch.native_batch_norm(*given, out=out), first_tensor(d)),
        }
    _, save_mean, save_rstd = torch.native_batch_norm(*given)
    (dy,) = tensors(d, "dy")
    arguments = (dy, x, w, mean, var, save_mean, save_rstd, mean is None, EPS, [True] * 3)
    backward = aten.native_batch_norm_backward.default
    return {"torch": Competitor(lambda: backward(*arguments), every_tensor(d))}


def with_numpy(d: Data) -> Mapping[str, Competitor]:
    """In float32, whatever x is."""
    axis = d.axis % d.x.ndim
    others = tuple(i for i in range(d.x.ndim) if i != axis)
    shape = [-1 if i == axis else 1 for i in range(d.x.ndim)]
    w, b = d.weight.reshape(shape), d.bias.reshape(shape)
    frozen = d.case.op.startswith("frozen")
    given = (d.mean.reshape(shape), 1 / np.sqrt(d.var.reshape(shape) + np.float32(EPS)))

    def moments(x):
        if frozen:
            return given
        return x.mean(others, keepdims=True), 1 / np.sqrt(x.var(others, keepdims=True) + np.float32(EPS))

    def forward():
        x = d.x.astype(np.float32, copy=False)
        mean, rstd = moments(x)
        return (((x - mean) * rstd * w + b).astype(d.x.dtype, copy=False),)

    def backward():
        x, dy = d.x.astype(np.float32, copy=False), d.dy.astype(np.float32, copy=False)
        x_hat = (x - mean) * rstd
        dweight, dbias = (dy * x_hat).sum(others, keepdims=True), dy.sum(others, keepdims=True)
        n = x.size // w.size
        dx = dy * (w * rstd) if frozen else (dy - dbias / n - x_hat * (dweight / n)) * (w * rstd)
        return dx.astype(d.x.dtype, copy=False), dweight.ravel(), dbias.ravel()

    if d.case.op.endswith("forward"):
        return {"numpy": Competitor(forward, every)}
    mean, rstd = moments(d.x.astype(np.float32, copy=False))
    return {"numpy": Competitor(backward, every)}


def with_numba(d: Data) -> Mapping[str, Competitor]:
    """Planes of a channel, or, where they are short, columns."""
    if d.case.dtype != "float32" or d.case.op == "frozen backward":
        return {}
    from numba_kernels import batch_norm as kernels

    x, dy, out, w, b = d.x, d.dy, d.out, d.weight, d.bias
    mean, rstd, dweight, dbias = (np.empty_like(w) for _ in range(4))
    N, C = d.case.shape[:2]
    S = int(np.prod(d.case.shape[2:]))
    planes, size = (N, C, S), x.size
    if d.case.op == "frozen forward":
        apply, x3, y3 = kernels.apply.variant(size), x.reshape(planes), out.reshape(planes)
        rstd[:] = 1 / np.sqrt(d.var + EPS)
        return {"numba": Competitor(partial(apply, x3, d.mean, rstd, w, b, y3), lambda _: (out,))}
    if d.axis == -1 or S < 64:
        S = 1 if d.axis == -1 else S
        shape = (x.size // (C * S), C * S)
        x2, dy2, out2 = (a.reshape(shape) for a in (x, dy, out))
        forward, backward = kernels.columns_forward.variant(size), kernels.columns_backward.variant(size)
        run = partial(forward, x2, S, w, b, EPS, out2, mean, rstd)
        back = partial(backward, x2, dy2, S, mean, rstd, w, out2, dweight, dbias)
    else:
        x3, dy3, out3 = (a.reshape(planes) for a in (x, dy, out))
        forward, backward = kernels.forward.variant(size), kernels.backward.variant(size)
        run = partial(forward, x3, w, b, EPS, out3, mean, rstd)
        back = partial(backward, x3, dy3, mean, rstd, w, out3, dweight, dbias)
    if d.case.op == "forward":
        return {"numba": Competitor(run, lambda _: (out,))}
    run()  # for mean and rstd
    return {"numba": Competitor(back, lambda _: (out, dweight, dbias))}
