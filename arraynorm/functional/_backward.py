"""What every norm's backward shares: its checks, and the gradients of weight and bias."""

from __future__ import annotations

from arraynorm import _array, _check
from arraynorm.typing import Array


def check_backward(function: str, dy: Array, x: Array, out: Array | None, *, needed: tuple[Array | None, ...]) -> None:
    """The checks of every backward: dy fits x, and `out` can take dx without spoiling what is `needed`."""
    _check.floating(function, "dy", dy)
    _check.companion(function, x, "dy", dy, tuple(x.shape))
    _check.output(function, "out", out, x, apart_from=needed, may_be=(dy,))


def parameter_gradients(
    sums: tuple[Array, Array], x: Array, weight: Array | None, bias: Array | None
) -> tuple[Array | None, Array | None]:
    """dweight and dbias from (sum of dy, sum of dy * x_hat), in the computation dtype; None where there is none."""
    sum_dy, sum_dy_x_hat = sums
    dtype = _array.widest_dtype(x, weight, bias)
    with _array.silent():  # a sum beyond float32 is infinite
        dweight = None if weight is None else _array.store(sum_dy_x_hat, dtype, None)
        dbias = None if bias is None else _array.store(sum_dy, dtype, None)
    return dweight, dbias
