"""Layer norm over the last dimension."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import arraynorm as an
import rows
from cases import EPS, Case, Competitor, Data, every, first, with_dtypes

_Case = partial(Case, "layer_norm")
SHAPES, SMALL = ((4096, 768), (8192, 4096)), (1, 768)
CASES = [
    *with_dtypes(case for shape in SHAPES for case in (_Case("forward", shape), _Case("backward", shape, read=2))),
    *(_Case(op, SMALL, read=read, tags=frozenset({"small"})) for op, read in (("forward", 1), ("backward", 2))),
]


def with_arraynorm(d: Data) -> Mapping[str, Competitor]:
    given = (d.x, d.x.shape[1], d.weight, d.bias)
    if d.case.op == "forward":
        return {
            "arraynorm": Competitor(lambda: an.layer_norm_forward(*given), first),
            "arraynorm out=": Competitor(lambda: an.layer_norm_forward(*given, out=d.out), first),
        }
    cache = an.layer_norm_forward(*given)[1]
    return {
        "arraynorm": Competitor(lambda: an.layer_norm_backward(d.dy, cache), every),
        "arraynorm out=": Competitor(lambda: an.layer_norm_backward(d.dy, cache, out=d.out), every),
    }


def with_torch(d: Data) -> Mapping[str, Competitor]:
    import torch

    from torch_arrays import aten, tensors
    from torch_arrays import every as every_tensor
    from torch_arrays import first as first_tensor

    x, dy, w, b = tensors(d, "x", "dy", "weight", "bias")
    shape = [x.shape[1]]
    if d.case.op == "forward":
        return {"torch": Competitor(lambda: torch.native_layer_norm(x, shape, w, b, EPS), first_tensor(d))}
    _, mean, rstd = torch.native_layer_norm(x, shape, w, b, EPS)
    arguments = (dy, x, shape, mean, rstd, w, b, [True] * 3)
    backward = aten.native_layer_norm_backward.default
    # Its dbias of 16-bit inputs was off by up to 0.11 of its largest element; whoever uses it has no other.
    tolerance = {"float16": 0.05, "bfloat16": 0.3}.get(d.case.dtype)
    return {"torch": Competitor(lambda: backward(*arguments), every_tensor(d), tolerance)}


def with_numpy(d: Data) -> Mapping[str, Competitor]:
    return rows.with_numpy(d, d.x.shape, (1,), (1, d.x.shape[1]))


def with_numba(d: Data) -> Mapping[str, Competitor]:
    return rows.with_numba(d, row=d.x.shape[1], period=1, spatial=1)
