"""What the forwards share: their checks."""

from __future__ import annotations

from collections.abc import Sequence

from arraynorm import _check
from arraynorm.typing import Array


def check_channels(
    function: str, x: Array, weight: Array | None, bias: Array | None, axis: int, eps: float, *, first: int = 0
) -> tuple[int, float]:
    """The checks of the norms with one weight and bias per channel, on an axis from `first`; axis and eps as used."""
    _check.input_array(function, "x", x)
    _check.min_ndim(x, 2)
    axis = _check.channel_axis(function, x, axis, first=first)
    _check.optional_companion(function, x, "weight", weight, (x.shape[axis],))
    _check.optional_companion(function, x, "bias", bias, (x.shape[axis],))
    return axis, _check.epsilon(function, eps)


def check_rows(
    function: str, x: Array, normalized_shape: int | Sequence[int], **parameters: Array | None
) -> tuple[int, ...]:
    """The checks of the norms over the last dimensions, with a weight and bias of their shape, which is returned."""
    _check.input_array(function, "x", x)
    shape = _check.normalized_shape(function, normalized_shape)
    _check.ends_with(x, shape)
    for name, parameter in parameters.items():
        _check.optional_companion(function, x, name, parameter, shape)
    return shape


def check_output(
    function: str,
    out: Array | None,
    x: Array,
    given: Sequence[Array | None],
    *,
    keep: bool,
    may_be: Sequence[Array | None] = (),
) -> None:
    """`out` can take y: it is not one of the arrays `given` beside x, nor x where a cache is to `keep` it."""
    if keep:
        _check.output(function, "out", out, x, apart_from=(x, *given), may_be=may_be)
    else:
        _check.output(function, "out", out, x, apart_from=given, may_be=(x, *may_be))
