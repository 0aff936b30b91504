"""Every norm a second time, in more digits than float64 has: what the tests hold the package to.

Naive formulas, and nothing shared with the package, not even structure: here a norm is a table of indices, whose rows
are the sets of elements that are normalized together, and one textbook formula over the rows. The mean is the mean,
the variance the mean of squared deviations, the gradient the chain rule through both (Ioffe & Szegedy, 2015, section
3, unsimplified). tests/test_oracle.py holds the gradients to differences in turn.

Numbers are longdouble where that has a fraction of 63 bits or more (x86; ARM Linux), else decimals of 100 digits
in object arrays (MSVC; macOS on ARM): slower, and just as right. Either way the sum of up to 2048 equal doubles is
exact, and so a constant set deviates by nothing.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

Host = np.ndarray[Any, Any]
Table = np.ndarray[Any, Any]
"""(sets, n), or (sets, 1) for what a whole set shares; longdouble or Decimal."""


def longdoubles(values: Any) -> Table:
    return np.asarray(values, dtype=np.float64).astype(np.longdouble)


def decimals(values: Any) -> Table:
    exact = np.frompyfunc(decimal.Decimal, 1, 1)  # a Decimal takes every bit of a float
    return np.asarray(exact(np.asarray(values, dtype=np.float64)), dtype=object)


wide = longdoubles if np.finfo(np.longdouble).nmant >= 63 else decimals
"""Numbers of up to 64 bits in the oracle's arithmetic; a test may set another."""


@contextmanager
def _arithmetic() -> Iterator[None]:
    """NaN and infinity are values in both arithmetics, and Decimal has its digits."""
    with decimal.localcontext(decimal.Context(prec=100, traps=[])), np.errstate(all="ignore"):
        yield


def narrow(exact: Table) -> Host:
    """In float64, for tolerances."""
    with _arithmetic():
        return exact.astype(np.float64)


def distance(actual: Host, exact: Table) -> Host:
    """|actual - exact|, subtracted in the oracle's arithmetic and then rounded to float64."""
    with _arithmetic():
        return np.abs(wide(actual) - exact).astype(np.float64)


class Gradients(NamedTuple):
    dx: Table
    dweight: Table | None
    dbias: Table | None
    daddend: Table | None


class Norm:
    """One norm of one input, with its sets and, for each element, the index of its weight and bias."""

    @_arithmetic()
    def __init__(
        self,
        x: Host,
        sets: Host,
        owner: Host,
        weight: Host | None,
        bias: Host | None,
        eps: float,
        *,
        given: tuple[Host, Host] | None = None,
        centered: bool = True,
        addend: Host | None = None,
        relu: bool = False,
    ) -> None:
        zero, one = wide(0.0), wide(1.0)
        self.shape, self.sets, self.owner = x.shape, sets, owner.reshape(-1)[sets]
        self.has_weight, self.has_bias, self.has_addend = weight is not None, bias is not None, addend is not None
        self.given, self.centered, self.relu = given is not None, centered, relu
        self.x = self.rows(x)
        self.weight = one if weight is None else wide(weight).reshape(-1)[self.owner]
        self.bias = zero if bias is None else wide(bias).reshape(-1)[self.owner]
        self.addend = zero if addend is None else self.rows(addend)
        if given is not None:
            self.mean, self.var = (wide(statistic)[self.owner] for statistic in given)
        else:
            self.mean = _mean(self.x) if centered else 0 * _mean(self.x)
            self.var = _mean((self.x - self.mean) ** 2)
        v = self.var + wide(eps)
        self.rstd = np.where(v == 0, zero, one / np.sqrt(v))
        self.deviation = self.x - self.mean
        self.x_hat = self.deviation * self.rstd
        self.before_relu = self.x_hat * self.weight + self.bias + self.addend

    @property
    def y(self) -> Table:
        with _arithmetic():
            v = self.before_relu
            return self.unroll(np.where(v < 0, wide(0.0), v) if self.relu else v)

    @_arithmetic()
    def backward(self, dy: Host) -> Gradients:
        """Gradients in the shapes of x, weight, bias (flat) and addend."""
        dv = self.gated(dy)
        dx_hat = dv * self.weight
        dx = dx_hat * self.rstd
        if not self.given:
            n = self.x.shape[1]
            dvar = np.sum(dx_hat * self.deviation, axis=1, keepdims=True) * (self.rstd**3 / -2)
            dx = dx + dvar * 2 * self.deviation / n
            if self.centered:
                dmean = np.sum(-dx_hat * self.rstd - dvar * 2 * self.deviation / n, axis=1, keepdims=True)
                dx = dx + dmean / n
        return Gradients(
            self.unroll(dx),
            self.per_parameter(dv * self.x_hat) if self.has_weight else None,
            self.per_parameter(dv) if self.has_bias else None,
            self.unroll(dv) if self.has_addend else None,
        )

    def gated(self, dy: Host) -> Table:
        """dy as a table, where ReLU lets it through."""
        with _arithmetic():
            return np.where(self.before_relu > 0, self.rows(dy), wide(0.0)) if self.relu else self.rows(dy)

    def rows(self, array: Host) -> Table:
        """An array of x's shape as a table."""
        return wide(array).reshape(-1)[self.sets]

    def unroll(self, table: Table) -> Table:
        """A table in x's shape: the inverse of `rows`."""
        flat = np.empty(math.prod(self.shape), dtype=table.dtype)
        flat[self.sets] = table
        return flat.reshape(self.shape)

    def per_parameter(self, table: Table) -> Table:
        """The sum over all elements that share a weight, for each weight."""
        total = wide(np.zeros(self.owner.max() + 1))
        np.add.at(total, self.owner, table)
        return total


def _mean(table: Table) -> Table:
    return np.sum(table, axis=1, keepdims=True) / table.shape[1]


# -- the norms, under the package's names ----------------------------------------------------------------------


def batch_norm(
    x: Host, weight: Host | None = None, bias: Host | None = None, *, axis: int = 1, eps: float = 1e-5, **more: Any
) -> Norm:
    sets = np.moveaxis(_indices(x), axis, 0).reshape(x.shape[axis], -1)
    return Norm(x, sets, _channel(x, axis), weight, bias, eps, **more)


def batch_norm_frozen(x: Host, mean: Host, var: Host, weight: Any = None, bias: Any = None, **options: Any) -> Norm:
    return batch_norm(x, weight, bias, given=(mean, var), **options)


def batch_norm_add_relu(x: Host, addend: Any = None, weight: Any = None, bias: Any = None, **options: Any) -> Norm:
    return batch_norm(x, weight, bias, addend=addend, relu=True, **options)


def batch_norm_add_relu_frozen(
    x: Host, addend: Host | None, mean: Host, var: Host, weight: Any = None, bias: Any = None, **options: Any
) -> Norm:
    return batch_norm(x, weight, bias, given=(mean, var), addend=addend, relu=True, **options)


def group_norm(
    x: Host, num_groups: int, weight: Any = None, bias: Any = None, *, axis: int = 1, eps: float = 1e-5
) -> Norm:
    sets = np.moveaxis(_indices(x), axis, 1).reshape(x.shape[0] * num_groups, -1)
    return Norm(x, sets, _channel(x, axis), weight, bias, eps)


def instance_norm(x: Host, weight: Any = None, bias: Any = None, *, axis: int = 1, eps: float = 1e-5) -> Norm:
    sets = np.moveaxis(_indices(x), axis, 1).reshape(x.shape[0] * x.shape[axis], -1)
    return Norm(x, sets, _channel(x, axis), weight, bias, eps)


def layer_norm(x: Host, normalized_shape: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> Norm:
    sets = _indices(x).reshape(-1, int(np.prod(normalized_shape)))
    return Norm(x, sets, _indices(x) % sets.shape[1], weight, bias, eps)


def rms_norm(x: Host, normalized_shape: Any, weight: Host | None = None, *, eps: float | None = None) -> Norm:
    if eps is None:
        float64 = np.float64 in {array.dtype.type for array in (x, weight) if array is not None}
        eps = 2.0**-52 if float64 else 2.0**-23
    sets = _indices(x).reshape(-1, int(np.prod(normalized_shape)))
    return Norm(x, sets, _indices(x) % sets.shape[1], weight, None, eps, centered=False)


def _indices(x: Host) -> Host:
    return np.arange(x.size).reshape(x.shape)


def _channel(x: Host, axis: int) -> Host:
    """The channel of every element."""
    return np.indices(x.shape)[axis]


# -- what follows from a norm ----------------------------------------------------------------------------------


@_arithmetic()
def running_stats(norm: Norm, running_mean: Host, running_var: Host, momentum: float) -> tuple[Table, Table]:
    """Exponential averages of the means and unbiased variances of a batch or instance norm's sets."""
    channels, n = len(running_mean), norm.x.shape[1]
    mean = norm.mean.reshape(-1, channels)  # (1, C) of a batch norm, (N, C) of an instance norm
    unbiased = (norm.var * n / (n - 1)).reshape(-1, channels)
    old, new = wide(1.0) - wide(momentum), wide(momentum)
    return (
        old * wide(running_mean) + new * mean.sum(axis=0) / len(mean),
        old * wide(running_var) + new * unbiased.sum(axis=0) / len(unbiased),
    )


@_arithmetic()
def quantized_levels(
    xq: Host,
    mean: Host,
    var: Host,
    weight: Host | None = None,
    bias: Host | None = None,
    *,
    x_scale: float,
    x_zero_point: int,
    y_scale: float,
    y_zero_point: int,
    relu: bool = False,
    **options: Any,
) -> Table:
    """The levels of a quantized batch norm, before they are rounded and clamped to the 8 bits."""
    norm = batch_norm_frozen(xq, mean, var, weight, bias, **options)
    x = (norm.x - x_zero_point) * wide(x_scale)
    v = (x - norm.mean) * norm.rstd * norm.weight + norm.bias
    v = np.where(v < 0, wide(0.0), v) if relu else v
    return norm.unroll(v / wide(y_scale) + y_zero_point)
