"""The steps that the norms are made of: each sees its arrays as (N, A, C, B), takes memory, and launches one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np

from arraynorm import _array
from arraynorm.kernels.cuda import _loader, _plan
from arraynorm.kernels.cuda._instances import (
    C_TYPES,
    ITEM_BYTES,
    PARAMETER_CODES,
    PARAMETER_SUMS,
    QUANTIZED_C_TYPES,
)
from arraynorm.kernels.cuda._plan import Four, Layout
from arraynorm.typing import Array

View = Callable[[tuple[int, ...]], Four]
"""From a kernel's shape, or its strides, to those of (N, A, C, B); a missing axis has size 1 and any stride."""


def takes(x: Array, *alike: Array | None) -> bool:
    """Whether the kernels take x: a dtype that they have, the same in all arrays of x's shape, and some elements."""
    return x.size > 0 and _array.dtype_name(x.dtype) in C_TYPES and all(a is None or a.dtype == x.dtype for a in alike)


def takes_quantized(x: Array) -> bool:
    return x.size > 0 and _array.dtype_name(x.dtype) in QUANTIZED_C_TYPES


def channels(sizes: tuple[int, ...]) -> Four:
    """Batch norm's (N, C, S): all samples at once."""
    n, c, s = sizes
    return 1, n, c, s


def samples(sizes: tuple[int, ...]) -> Four:
    """Group and instance norm's (N, A, C, B)."""
    n, a, c, b = sizes
    return n, a, c, b


def rows(sizes: tuple[int, ...]) -> Four:
    """Layer and RMS norm's (rows, K)."""
    n, k = sizes
    return n, 1, k, 1


def layout(view: View, x: Array, dy: Array | None = None, y: Array | None = None, z: Array | None = None) -> Layout:
    """What plans depend on, of the arrays in their places."""
    dtype, shape, address = _array.dtype_name(x.dtype), view(x.shape), 16
    strides: list[Four | None] = []
    for array in (x, dy, y, z):
        if array is None:
            strides.append(None)
            continue
        steps = view(tuple(stride // ITEM_BYTES[dtype] for stride in array.strides))
        strides.append(tuple(0 if n == 1 else step for n, step in zip(shape, steps, strict=True)))  # type: ignore[arg-type]
        address |= _array.pointer(array)
    return Layout(dtype, shape, tuple(strides), address & -address)  # type: ignore[arg-type]


def parameter(array: Array | None) -> tuple[Array | None, np.int32]:
    """A contiguous weight or bias, and the code of its dtype."""
    if array is None:
        return None, np.int32(0)
    return _contiguous(array), np.int32(PARAMETER_CODES[_array.dtype_name(array.dtype)])


def statistic(array: Array) -> Array:
    """A mean, rstd or sum as the kernels read it: float64, contiguous."""
    return _contiguous(_array.widen(array))


def pair(first: Array, second: Array) -> Array:
    """Two (C,) arrays as the kernels read means: (2, C) float64."""
    return _array.array_namespace(first).stack((_array.widen(first), _array.widen(second)))


def _contiguous(array: Array) -> Array:
    return array if array.flags.c_contiguous else array.copy()


def fresh(like: Array, shape: tuple[int, ...] | None, dtype: str) -> Array:
    """Memory beside `like`, not initialized; None is its shape, with its order of axes."""
    xp = _array.array_namespace(like)
    return xp.empty_like(like) if shape is None else xp.empty(shape, dtype=getattr(xp, dtype))


def like(x: Array, out: Array | None) -> Array:
    """`out`, or a new array like x."""
    return fresh(x, None, _array.dtype_name(x.dtype)) if out is None else out


def doubles(x: Array, *shape: int) -> Array:
    """A new float64 array beside x."""
    return fresh(x, shape, "float64")


def mask(x: Array) -> Array:
    """One bit for each element of x."""
    return fresh(x, (-(-x.size // 8),), "uint8")


def zeros(x: Array, count: int) -> Array | None:
    """Counters of blocks that have arrived."""
    xp = _array.array_namespace(x)
    return xp.zeros((count,), dtype=xp.uint32) if count else None


# -- forward ---------------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """(N, C / K) float64 arrays, or None for those that nobody needs."""

    mean: Array | None = None
    m2: Array | None = None
    var: Array | None = None
    rstd: Array | None = None


def moments(view: View, x: Array, group: int, eps: float, out: Statistics) -> None:
    """Statistics of groups of `group` channels."""
    plan, _, partials, jobs = _plan.moments(layout(view, x), group, _loader.device_of(x))
    _loader.launch(x, plan, x, doubles(x, partials), zeros(x, jobs), *out, np.float64(eps))


def row_forward(
    view: View,
    x: Array,
    group: int,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    y: Array,
    out: Statistics,
    *,
    centered: bool = True,
    whole_block: bool = False,
) -> None:
    """y and statistics in one launch."""
    plan = _plan.row_forward(layout(view, x, None, y), group, centered, whole_block, _loader.device_of(x))
    affine = (*parameter(weight), *parameter(bias))
    _loader.launch(x, plan, x, y, *affine, np.float64(eps), out.mean, out.var, out.rstd)


def apply(
    view: View,
    x: Array,
    group: int,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    y: Array,
    *,
    addend: Array | None = None,
    mask: Array | None = None,
) -> None:
    """y of given statistics; with a mask to write, ReLU of that plus the addend."""
    plan = _plan.apply(layout(view, x, addend, y), group, mask is not None, _loader.device_of(x))
    _loader.launch(x, plan, x, addend, mean, rstd, *parameter(weight), *parameter(bias), y, mask)


def forward(
    view: View,
    x: Array,
    group: int,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    y: Array,
    mean: Array,
    var: Array,
    rstd: Array,
) -> None:
    """y and statistics in one launch where a unit fits on the chip, else in two; the same bits either way."""
    out = Statistics(mean=mean, var=var, rstd=rstd)
    if reads_once(view, x, None, y, group, 1):
        # batch norm's statistics may come from `moments` as well, which has no teams smaller than a block
        row_forward(view, x, group, weight, bias, eps, y, out, whole_block=view is channels)
    else:
        moments(view, x, group, eps, out)
        apply(view, x, group, mean, rstd, weight, bias, y)


def reads_once(view: View, x: Array, dy: Array | None, y: Array, group: int, arrays: int) -> bool:
    """Whether one block does all there is to do for a unit, with packs as wide as those of the separate steps."""
    device = _loader.device_of(x)
    alone, together = layout(view, x, dy), layout(view, x, dy, y)
    return _plan.is_one_part(together, group, arrays, device) and (
        _plan.slab_width(alone, group) == _plan.slab_width(together, group)
    )


# -- backward --------------------------------------------------------------------------------------------------


class Products(NamedTuple):
    """What `products` leaves for `dx`."""

    partial: Array
    parts: int


def products(
    view: View,
    dy: Array,
    x: Array,
    group: int,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    sums: Array | None,
    means: Array | None,
    *,
    mask: Array | None = None,
) -> Products:
    """Sums (2, N, C / K) of g and g * x_hat with g = dy * weight, through ReLU if there is a mask, and their means."""
    plan, parts, partials, jobs = _plan.products(layout(view, x, dy), group, mask is not None, _loader.device_of(x))
    partial = doubles(x, partials)
    _loader.launch(x, plan, dy, mask, x, mean, rstd, *parameter(weight), partial, zeros(x, jobs), sums, means)
    return Products(partial, parts)


def dx(
    view: View,
    dy: Array,
    x: Array | None,
    group: int,
    mean: Array | None,
    rstd: Array,
    weight: Array | None,
    means: Array | None,
    out: Array,
    *,
    mask: Array | None = None,
    daddend: Array | None = None,
    weighted: bool = False,
    found: Products | None = None,
) -> Array | None:
    """dx; for given statistics x, mean and means are None. From found products (dbias, dweight) (2, C) as well."""
    where = layout(view, dy if x is None else x, dy, out, daddend)
    plan = _plan.dx(where, group, mask is not None, found.parts if found else 0, _loader.device_of(dy))
    gradients = doubles(dy, 2, where.shape[2]) if found else None
    partial = found.partial if found else None
    _loader.launch(
        *(dy, plan, dy, mask, x, mean, rstd, *parameter(weight), means, np.int32(weighted)),
        *(out, daddend, partial, gradients),
    )
    return gradients


def slab_backward(
    view: View, dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array, sums: Array
) -> None:
    """dx and the sums (2, N, C) of dy and dy * x_hat in one launch, where `reads_once`."""
    plan = _plan.slab_backward(layout(view, x, dy, out), view is channels, _loader.device_of(x))
    _loader.launch(x, plan, dy, x, mean, rstd, *parameter(weight), out, sums)


def row_backward(
    dy: Array, x: Array, mean: Array | None, rstd: Array, weight: Array | None, out: Array
) -> tuple[Array, Array]:
    """dweight and dbias (K,) of x (rows, K), and dx in `out`."""
    plans = _plan.row_backward(layout(rows, x, dy, out), mean is not None, _loader.device_of(x))
    between, gradients = doubles(x, plans.partials), doubles(x, 2, x.shape[1])
    given = (dy, x, mean, rstd, *parameter(weight))
    if plans.second.instance == PARAMETER_SUMS:
        _loader.launch(x, plans.first, *given, out, between)
        sum_columns(between, plans.first.blocks, x.shape[1], 2 * x.shape[1], x.shape[1], gradients)
    else:
        _loader.launch(x, plans.first, *given, between)
        _loader.launch(x, plans.second, *given, between, out, gradients)
    return gradients[0, :], gradients[1, :]


def sum_columns(matrices: Array, count: int, columns: int, pitch: int, apart: int, out: Array) -> None:
    """Two (count, columns) matrices, summed into out (2, columns)."""
    sizes = (np.int64(n) for n in (count, columns, pitch, apart))
    _loader.launch(out, _plan.parameter_sums(columns), matrices, *sizes, out)


def grouped_backward(
    dy: Array, x: Array, group: int, mean: Array, rstd: Array, weight: Array | None, out: Array
) -> tuple[Array, Array]:
    """dweight and dbias (C,) of group or instance norm, and dx in `out`: two launches."""
    means = doubles(x, 2, *mean.shape)
    found = products(samples, dy, x, group, mean, rstd, weight, None, means)
    dbias, dweight = cast(
        "Array", dx(samples, dy, x, group, mean, rstd, weight, means, out, weighted=True, found=found)
    )
    return dweight, dbias


# -- quantized -------------------------------------------------------------------------------------------------


def requantize(x: Array, a: Array, b: Array, scales: tuple[float, ...], relu: bool, y: Array) -> None:
    """y of x (N, C, S), with scales and zero points of x and of y."""
    plan = _plan.requantize(layout(channels, x, None, y), _loader.device_of(x))
    _loader.launch(x, plan, x, a, b, *(np.float64(s) for s in scales), np.int32(relu), y)
