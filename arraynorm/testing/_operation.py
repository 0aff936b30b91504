"""What is checked: a forward, its backward and the point; two functions, or a layer as two functions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from arraynorm import _array, _check
from arraynorm.layers import Module
from arraynorm.testing._differences import Host
from arraynorm.typing import Array

Forward: TypeAlias = Callable[..., tuple[Array, Any]]
Backward: TypeAlias = Callable[[Array, Any], Sequence[Array | None]]


class GradientError(AssertionError):
    """A backward does not return the gradients of its forward."""


class Operation(NamedTuple):
    """A forward, its backward and the inputs at which they are checked."""

    forward: Forward
    backward: Backward
    inputs: Sequence[Array | None]
    names: Sequence[str]
    """Of the inputs, for messages."""

    def evaluate(self, inputs: Sequence[Array | None]) -> tuple[Array, Any]:
        """(y, cache) of `forward`, and an error where it returns anything else."""
        returned = self.forward(*inputs)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(f"gradcheck: forward must return (y, cache), got {type(returned).__name__}")
        return returned

    def function_of(self, position: int, shape: tuple[int, ...]) -> Callable[[Host], Host]:
        """y, of this shape, as a function of one input alone, from host to host."""
        like: Array = self.inputs[position]
        xp, device = _array.array_namespace(like), _array.device(like)

        def function(x: Host) -> Host:
            moved = _array.from_numpy(x, xp, device)
            y = host(self.evaluate([*self.inputs[:position], moved, *self.inputs[position + 1 :]])[0])
            if y.shape != shape:
                name = self.names[position]
                raise GradientError(f"gradcheck: y must keep its shape {shape}, got {y.shape} for another {name}")
            return y

        return function


def operation(forward: Any, backward: Any, inputs: Any) -> Operation:
    """What `gradcheck` was given, checked."""
    if not isinstance(inputs, Sequence):  # an array would be taken apart
        raise TypeError(f"gradcheck: inputs must be a sequence of arrays, got {type(inputs).__name__}")
    if not callable(forward):
        raise TypeError(f"gradcheck: forward must be callable, got {type(forward).__name__}")
    if not isinstance(forward, Module):
        if not callable(backward):
            raise TypeError(f"gradcheck: backward must be callable, got {type(backward).__name__}")
        op = Operation(forward, backward, inputs, _argument_names(forward, len(inputs)))
    elif backward is None:
        op = _operation_of_module(forward, inputs)
    else:
        raise TypeError("gradcheck: a Module has a backward of its own; name the inputs: gradcheck(layer, inputs=(x,))")
    _check_inputs(op)
    return op


def host(array: Array) -> Host:
    """A copy, since functions under test may go on to write to the memory of what they returned."""
    return np.array(_array.to_numpy(array))


def _operation_of_module(module: Module, inputs: Sequence[Array | None]) -> Operation:
    """A layer as pure functions of its inputs and its parameters."""
    pristine = copy.deepcopy(module).double().requires_grad_()
    pristine.zero_grad()
    parameters = dict(pristine.named_parameters())
    places = {  # (owner, name): a tied parameter has several
        path: [
            (owner, name) for owner, m in pristine.named_modules() for name, p in m._parameters.items() if p is array
        ]
        for path, array in parameters.items()
    }
    count = len(inputs)

    def forward(*arrays: Array) -> tuple[Array, Any]:
        layer = copy.deepcopy(pristine)  # a training forward moves running statistics: each starts from the same ones
        owners = dict(layer.named_modules())
        for path, array in zip(parameters, arrays[count:], strict=True):
            for owner, name in places[path]:
                setattr(owners[owner], name, array)
        return layer(*arrays[:count]), layer

    def backward(dy: Array, layer: Any) -> Sequence[Array | None]:
        dx = layer.backward(dy)
        dx = dx if isinstance(dx, tuple) else (dx,)
        owners = dict(layer.named_modules())

        def gradient(path: str) -> Array | None:
            found = [g for owner, name in places[path] if (g := owners[owner].grads.get(name)) is not None]
            return sum(found[1:], found[0]) if found else None

        return [*dx[:count], *map(gradient, parameters), *dx[count:]]

    names = _argument_names(module.forward, count) + [f"parameter {name}" for name in parameters]
    return Operation(forward, backward, (*inputs, *parameters.values()), names)


def _argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """ "argument 0 (x)", ...: with the parameter's name where there is a signature that tells it."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have none
        parameters = []
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [f"argument {i} ({known[i]})" if i < len(known) else f"argument {i}" for i in range(count)]


def _check_inputs(op: Operation) -> None:
    if all(x is None for x in op.inputs):
        raise ValueError(f"gradcheck: inputs must hold at least one array, got {len(op.inputs)} times None")
    for name, x in zip(op.names, op.inputs, strict=True):
        if x is None:
            continue
        if not _array.is_array(x):
            raise TypeError(f"gradcheck: {name} must be an array or None, got {type(x).__name__}")
        if _array.dtype_name(x.dtype) != "float64":
            raise TypeError(
                f"gradcheck: {name} must be float64, got {_array.dtype_name(x.dtype)}: finite differences in any "
                "other dtype can't tell a right gradient from a wrong one"
            )
        _check.array("gradcheck", name, x)  # its elements are all: no mask, no matrix product
        values = host(x)
        if not np.isfinite(values).all():
            raise ValueError(f"gradcheck: {name} must be finite, got {values[~np.isfinite(values)][0]}")
