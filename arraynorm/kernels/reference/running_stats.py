"""Running statistics: an exponential average of the batch means and of the unbiased batch variances."""

from __future__ import annotations

from arraynorm import _array
from arraynorm.typing import Array


def unbiased(var: Array, count: int) -> Array:
    """Bessel's correction, var * n / (n - 1): what a running variance averages."""
    return var * (count / (count - 1))


def exponential_average(old: Array, new: Array, momentum: float) -> Array:
    """(1 - momentum) * old + momentum * new, in float64 and then old's dtype.

    Two products and one sum, each rounded: the same bits on any CPU or GPU that has float64, so that the buffers of
    ranks on mixed machines stay equal.
    """
    with _array.silent():
        average = (1 - momentum) * _array.widen(old) + momentum * _array.widen(new)
        return _array.store(average, old.dtype, None)
