"""What every norm's backward shares: its checks, and the gradients of weight and bias."""

from __future__ import annotations

from arraynorm import _array, _check
from arraynorm.typing import Array


def check_backward(function: str, dy: Array, x: Array, out: Array | None, *, needed: tuple[Array | None, ...]) -> None:
    """The checks of every backward: dy fits x, and `out` can take dx without spoiling what is `needed`."""
    _check.companion(function, x, "dy", dy, tuple(x.shape))
    _check.output(function, "out", out, x, apart_from=needed, may_be=(dy,))


def parameter_gradients(x: Array, *gradients: tuple[Array | None, Array]) -> tuple[Array | None, ...]:
    """From pairs (parameter, its gradient in float64): the gradients in the computation dtype; None for None."""
    dtype = _array.widest_dtype(x, *(parameter for parameter, _ in gradients))
    with _array.silent():  # a sum beyond float32 is infinite
        return tuple(None if parameter is None else _array.store(g, dtype, None) for parameter, g in gradients)
