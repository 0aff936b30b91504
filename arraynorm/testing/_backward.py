"""One forward and backward, and what must hold of them whatever the numbers: shapes, dtypes, libraries, bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from arraynorm import _array
from arraynorm.testing._differences import Host
from arraynorm.testing._operation import GradientError, Operation, host
from arraynorm.typing import Array


def gradients_of(op: Operation, seed: np.random.SeedSequence) -> tuple[Host, list[Host | None]]:
    """A random dy and the gradient of each input, on the host; an error if a second run gives other bits."""
    (dy, *first), (_, *second) = _run(op, seed), _run(op, seed)
    for name, one, other in zip((None, *op.names), first, second, strict=True):
        if one is not None and other is not None and one.tobytes() != other.tobytes():
            what = f"the gradient of {name}" if name else "y"
            raise GradientError(f"gradcheck: {what} differs between two runs on the same inputs")
    return dy, first[1:]


def _run(op: Operation, seed: np.random.SeedSequence) -> tuple[Host, Host, *tuple[Host | None, ...]]:
    """dy, y and the gradients."""
    like = next(x for x in op.inputs if x is not None)
    before = [None if x is None else host(x) for x in op.inputs]
    y, cache = op.evaluate(op.inputs)
    _check_array("y", y, like)
    y_host, dy_host = host(y), np.asarray(np.random.default_rng(seed).standard_normal(y.shape))
    dy = _array.from_numpy(dy_host.copy(), _array.array_namespace(like), _array.device(like))
    gradients = op.backward(dy, cache)
    _check_gradients(op, gradients)
    for name, array, value in zip(("dy", *op.names), (dy, *op.inputs), (dy_host, *before), strict=True):
        if value is not None and host(array).tobytes() != value.tobytes():
            raise GradientError(f"gradcheck: {name} was written to")
    return dy_host, y_host, *(None if g is None else host(g) for g in gradients[: len(op.inputs)])


def _check_gradients(op: Operation, gradients: Sequence[Array | None]) -> None:
    if not isinstance(gradients, Sequence):
        raise GradientError(f"gradcheck: backward must return a sequence of gradients, got {type(gradients).__name__}")
    # Gradients beyond the inputs belong to arguments left at their default, None.
    for name, x, gradient in itertools.zip_longest(op.names, op.inputs, gradients):
        if x is None and gradient is not None:
            raise GradientError(f"gradcheck: the gradient of {name or 'an absent argument'} must be None")
        if x is not None and gradient is None:
            raise GradientError(f"gradcheck: the gradient of {name} is missing")
        if x is not None:
            _check_array(f"the gradient of {name}", gradient, x)
            if tuple(gradient.shape) != tuple(x.shape):
                raise GradientError(
                    f"gradcheck: the gradient of {name} must have shape {tuple(x.shape)}, got {tuple(gradient.shape)}"
                )


def _check_array(what: str, array: Any, like: Array) -> None:
    if _array.library(array) != _array.library(like):
        raise GradientError(f"gradcheck: {what} must be a {_array.library(like)} array, got {type(array).__name__}")
    if array.dtype != like.dtype:
        raise GradientError(f"gradcheck: {what} must be {like.dtype}, got {array.dtype}")
    values = host(array)
    if not np.isfinite(values).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise GradientError(f"gradcheck: {what} must be finite, got {values[index]} at {list(index)}")
