"""Instance norm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import arraynorm as an
import rows
from cases import EPS, Case, Competitor, Data, every, first, with_dtypes

_Case = partial(Case, "instance_norm")
SHAPE, LARGE = (16, 64, 128, 128), (32, 64, 128, 128)
CASES = [
    *with_dtypes((_Case("forward", SHAPE), _Case("backward", SHAPE, read=2))),
    *(_Case(op, LARGE, read=read, tags=frozenset({"large"})) for op, read in (("forward", 1), ("backward", 2))),
]


def with_arraynorm(d: Data) -> Mapping[str, Competitor]:
    given = (d.x, d.weight, d.bias)
    if d.case.op == "forward":
        return {
            "arraynorm": Competitor(lambda: an.instance_norm_forward(*given), first),
            "arraynorm out=": Competitor(lambda: an.instance_norm_forward(*given, out=d.out), first),
        }
    cache = an.instance_norm_forward(*given)[1]
    return {
        "arraynorm": Competitor(lambda: an.instance_norm_backward(d.dy, cache), every),
        "arraynorm out=": Competitor(lambda: an.instance_norm_backward(d.dy, cache, out=d.out), every),
    }


def with_torch(d: Data) -> Mapping[str, Competitor]:
    """`torch.instance_norm`, and what its autograd runs: batch norm's backward over (1, N * C, ...)."""
    import torch

    from torch_arrays import alone, aten, tensors
    from torch_arrays import every as every_tensor

    x, dy, w, b = tensors(d, "x", "dy", "weight", "bias")
    if d.case.op == "forward":
        arguments = (x, w, b, None, None, True, 0.1, EPS, False)
        return {"torch": Competitor(lambda: torch.instance_norm(*arguments), alone(d))}
    N, C, *spatial = x.shape
    flat, dy_flat, repeated = x.view(1, N * C, *spatial), dy.view(1, N * C, *spatial), w.repeat(N)
    _, mean, rstd = torch.native_batch_norm(flat, repeated, b.repeat(N), None, None, True, 0.1, EPS)
    arguments = (dy_flat, flat, repeated, None, None, mean, rstd, True, EPS, [True] * 3)

    def backward():
        dx, dweight, dbias = aten.native_batch_norm_backward.default(*arguments)
        return dx.view(x.shape), dweight.view(N, C).sum(0), dbias.view(N, C).sum(0)

    return {"torch": Competitor(backward, every_tensor(d))}


def with_numpy(d: Data) -> Mapping[str, Competitor]:
    N, C = d.x.shape[:2]
    return rows.with_numpy(d, (N, C, d.x[0, 0].size), (2,), (1, C, 1))


def with_numba(d: Data) -> Mapping[str, Competitor]:
    spatial = d.x[0, 0].size
    return rows.with_numba(d, row=spatial, period=d.x.shape[1], spatial=spatial)
