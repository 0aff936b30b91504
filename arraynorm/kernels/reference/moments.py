"""Mean, sum of squared deviations and reciprocal standard deviation: what all the norms share."""

from __future__ import annotations

import math

from arraynorm import _array
from arraynorm.typing import Array


def moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and sum of squared deviations over `axes`, which are kept with size 1. x is float64.

    Two passes over x - pivot, where the pivot is the first element of each set. A constant set therefore deviates
    by exactly zero at any magnitude, and no sum is longer than the spread of the data. Never E[x^2] - E[x]^2.
    """
    xp = _array.array_namespace(x)
    n = math.prod(x.shape[axis] for axis in axes)
    if n == 0:  # an empty shard contributes 0, not nan
        zeros = xp.sum(x, axis=axes, keepdims=True)
        return zeros, zeros
    pivot = x[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(x.ndim))]
    d = x - pivot
    shift = xp.sum(d, axis=axes, keepdims=True) / n
    d = d - shift
    return pivot + shift, _in_range(xp.sum(d * d, axis=axes, keepdims=True))


def reciprocal_std(var: Array, eps: float) -> Array:
    """rstd = 1 / sqrt(var + eps), and 0 where that is 1/0: a set without deviation normalizes to zero."""
    xp = _array.array_namespace(var)
    with _array.silent():  # called outside a kernel too, with whatever variance the user gives
        v = var + eps
        zero = v == 0
        return xp.where(zero, xp.zeros_like(v), 1 / xp.sqrt(xp.where(zero, xp.ones_like(v), v)))


def mean_square(x: Array, axes: tuple[int, ...]) -> Array:
    """The mean of squares over `axes`, which are kept with size 1; infinite where x is. x is float64."""
    xp = _array.array_namespace(x)
    mean = mean_over(x * x, axes)
    return xp.where(xp.any(xp.isinf(x), axis=axes, keepdims=True), mean, _in_range(mean))


def _in_range(squares: Array) -> Array:
    """NaN for a sum of squares beyond float64 (deviations from 1e154): as infinity it would make y quietly zero."""
    xp = _array.array_namespace(squares)
    return xp.where(xp.isinf(squares), xp.full_like(squares, float("nan")), squares)


def mean_over(x: Array, axes: tuple[int, ...]) -> Array:
    """The mean over `axes`, which are kept with size 1; 0 over no elements. x is float64."""
    xp = _array.array_namespace(x)
    n = math.prod(x.shape[axis] for axis in axes)
    return xp.sum(x, axis=axes, keepdims=True) / max(n, 1)
