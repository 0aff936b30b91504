"""Batch norm, plus an addend, then ReLU, over x (N, C, S): y = max(x_hat * weight + bias + addend, 0).

The tail of a residual block (He et al., 2015, https://arxiv.org/abs/1512.03385, figure 2) in one pass over memory.
The backward needs only where y > 0: one bit per element.
"""

from __future__ import annotations

import math

from arraynorm import _array
from arraynorm.kernels._kernel import Kernel
from arraynorm.kernels.reference.batch_norm import (
    affine_of_x_hat,
    batch_norm_backward_apply,
    batch_norm_backward_reduce,
    batch_norm_frozen_backward_apply,
    batch_norm_stats,
)
from arraynorm.kernels.reference.moments import reciprocal_std
from arraynorm.typing import Array


@Kernel
def batch_norm_add_relu_apply(
    x: Array,
    addend: Array | None,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array | None,
) -> tuple[Array, Array]:
    """x, addend (N, C, S); the others (C,) -> y (N, C, S), mask of y > 0 (ceil(N*C*S / 8),) uint8."""
    xp = _array.array_namespace(x)
    v = affine_of_x_hat(x, mean, rstd, weight, bias)
    if addend is not None:
        v = v + _array.widen(addend)
    # rounded first: a v that underflows to 0 in x's dtype is at the kink, where the gradient is 0
    y = _array.store(xp.maximum(v, xp.zeros_like(v)), x.dtype, out)
    return y, pack_bits(y > 0)


@Kernel
def batch_norm_add_relu_forward(
    x: Array, addend: Array | None, weight: Array | None, bias: Array | None, eps: float, out: Array | None
) -> tuple[Array, Array, Array, Array, Array]:
    """x, addend (N, C, S); weight, bias (C,) -> y, mask as above; mean, var, rstd (C,) float64, var biased."""
    mean, m2 = batch_norm_stats.reference(x)
    var = m2 / max(x.shape[0] * x.shape[2], 1)
    rstd = reciprocal_std(var, eps)
    return *batch_norm_add_relu_apply.reference(x, addend, mean, rstd, weight, bias, out), mean, var, rstd


@Kernel
def batch_norm_add_relu_backward_reduce(
    dy: Array, mask: Array, x: Array, mean: Array, rstd: Array
) -> tuple[Array, Array]:
    """dy, x (N, C, S); mask as above; mean, rstd (C,) -> sum of g, sum of g * x_hat (C,), with g = dy where y > 0."""
    return batch_norm_backward_reduce.reference(_through_relu(dy, mask), x, mean, rstd)


@Kernel
def batch_norm_add_relu_backward_apply(
    dy: Array,
    mask: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    mean_g: Array,
    mean_g_x_hat: Array,
    with_addend: bool,
    out: Array | None,
    out_addend: Array | None,
) -> tuple[Array, Array | None]:
    """dy, x (N, C, S); mask as above; the others (C,) -> dx, daddend = g (N, C, S); without an addend dx, None."""
    g = _through_relu(dy, mask)
    dx = batch_norm_backward_apply.reference(g, x, mean, rstd, weight, mean_g, mean_g_x_hat, out)
    return dx, _array.store(g, x.dtype, out_addend) if with_addend else None


@Kernel
def batch_norm_add_relu_backward(
    dy: Array,
    mask: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    with_addend: bool,
    out: Array | None,
    out_addend: Array | None,
) -> tuple[Array, Array | None, Array, Array]:
    """dy, x (N, C, S); mask as above; mean, rstd, weight (C,) -> dx, daddend; dweight, dbias (C,) float64."""
    dbias, dweight = batch_norm_add_relu_backward_reduce.reference(dy, mask, x, mean, rstd)
    n = max(x.shape[0] * x.shape[2], 1)
    dx, daddend = batch_norm_add_relu_backward_apply.reference(
        dy, mask, x, mean, rstd, weight, dbias / n, dweight / n, with_addend, out, out_addend
    )
    return dx, daddend, dweight, dbias


@Kernel
def batch_norm_add_relu_frozen_backward_apply(
    dy: Array,
    mask: Array,
    x: Array,
    rstd: Array,
    weight: Array | None,
    with_addend: bool,
    out: Array | None,
    out_addend: Array | None,
) -> tuple[Array, Array | None]:
    """As `batch_norm_add_relu_backward_apply`, for given statistics: dx = weight * rstd * g."""
    g = _through_relu(dy, mask)
    dx = batch_norm_frozen_backward_apply.reference(g, x, rstd, weight, out)
    return dx, _array.store(g, x.dtype, out_addend) if with_addend else None


def _through_relu(dy: Array, mask: Array) -> Array:
    """g = dy where y > 0, else 0, in float64 (a copy, so that `out=dy` is safe)."""
    xp = _array.array_namespace(dy)
    dy = _array.widen(dy)
    return xp.where(unpack_bits(mask, dy.shape), dy, xp.zeros_like(dy))


def pack_bits(bits: Array) -> Array:
    """Booleans of any shape -> uint8 (ceil(size / 8),): C order, least significant bit first, zero-padded."""
    xp = _array.array_namespace(bits)
    flat = xp.astype(xp.reshape(bits, (-1,)), xp.uint8)
    padding = xp.zeros((-flat.shape[0] % 8,), dtype=xp.uint8, device=_array.device(bits))
    flat = xp.concat((flat, padding))
    return xp.sum(xp.reshape(flat, (-1, 8)) * _places(flat), axis=1, dtype=xp.uint8)


def unpack_bits(mask: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `pack_bits`: booleans of `shape`."""
    xp = _array.array_namespace(mask)
    bits = xp.reshape(xp.bitwise_and(mask[:, None], _places(mask)) != 0, (-1,))
    return xp.reshape(bits[: math.prod(shape)], shape)


def _places(like: Array) -> Array:
    """The value of each bit of a byte, least significant first."""
    xp = _array.array_namespace(like)
    return xp.asarray([1, 2, 4, 8, 16, 32, 64, 128], dtype=xp.uint8, device=_array.device(like))
