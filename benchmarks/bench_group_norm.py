"""Group norm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

import arraynorm as an
import rows
from cases import EPS, Case, Competitor, Data, every, first, with_dtypes

_Case = partial(Case, "group_norm", groups=32)
SHAPE, LARGE = (16, 256, 32, 32), (64, 256, 56, 56)
CASES = [
    *with_dtypes((_Case("forward", SHAPE), _Case("backward", SHAPE, read=2))),
    *(_Case(op, LARGE, read=read, tags=frozenset({"large"})) for op, read in (("forward", 1), ("backward", 2))),
]


def with_arraynorm(d: Data) -> Mapping[str, Competitor]:
    given = (d.x, d.case.groups, d.weight, d.bias)
    if d.case.op == "forward":
        return {
            "arraynorm": Competitor(lambda: an.group_norm_forward(*given), first),
            "arraynorm out=": Competitor(lambda: an.group_norm_forward(*given, out=d.out), first),
        }
    cache = an.group_norm_forward(*given)[1]
    return {
        "arraynorm": Competitor(lambda: an.group_norm_backward(d.dy, cache), every),
        "arraynorm out=": Competitor(lambda: an.group_norm_backward(d.dy, cache, out=d.out), every),
    }


def with_torch(d: Data) -> Mapping[str, Competitor]:
    import torch

    from torch_arrays import aten, tensors
    from torch_arrays import every as every_tensor
    from torch_arrays import first as first_tensor

    x, dy, w, b = tensors(d, "x", "dy", "weight", "bias")
    sizes = (*x.shape[:2], int(np.prod(x.shape[2:])), d.case.groups)
    if d.case.op == "forward":
        return {"torch": Competitor(lambda: torch.native_group_norm(x, w, b, *sizes, EPS), first_tensor(d))}
    _, mean, rstd = torch.native_group_norm(x, w, b, *sizes, EPS)
    arguments = (dy, x, mean, rstd, w, *sizes, [True] * 3)
    backward = aten.native_group_norm_backward.default
    return {"torch": Competitor(lambda: backward(*arguments), every_tensor(d))}


def with_numpy(d: Data) -> Mapping[str, Competitor]:
    N, C, groups = *d.x.shape[:2], d.case.groups
    return rows.with_numpy(d, (N, groups, C // groups, d.x[0, 0].size), (2, 3), (1, groups, C // groups, 1))


def with_numba(d: Data) -> Mapping[str, Competitor]:
    C, spatial, groups = d.x.shape[1], d.x[0, 0].size, d.case.groups
    return rows.with_numba(d, row=C // groups * spatial, period=groups, spatial=spatial)
