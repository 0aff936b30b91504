"""Good calls of every functional op: what the faults are tried on."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import arraynorm as an
from bad_input.faults import BY_ARGUMENT, Fault

Arguments = dict[str, Any]
Shape = tuple[int, ...]

SHAPE = (4, 3, 2, 5)
# The names of each forward's arguments; `out` comes to all of them.
OPS = {
    "batch_norm": "x weight bias axis eps comm",
    "batch_norm_frozen": "x mean var weight bias axis eps",
    "batch_norm_add_relu": "x addend weight bias axis eps comm",
    "batch_norm_add_relu_frozen": "x addend mean var weight bias axis eps",
    "instance_norm": "x weight bias axis eps",
    "group_norm": "x num_groups weight bias axis eps",
    "layer_norm": "x normalized_shape weight bias eps",
    "rms_norm": "x normalized_shape weight eps",
}
QUANTIZED = "xq mean var weight bias x_scale x_zero_point y_scale y_zero_point axis eps"
SETTINGS = {
    "axis": 1,
    "eps": 1e-5,
    "comm": None,
    "num_groups": 3,
    "momentum": 0.1,
    "x_scale": 0.05,
    "x_zero_point": 7,
    "y_scale": 0.03,
    "y_zero_point": 9,
}
# Arguments whose faults are not those of their name.
ROLES = {("rms_norm", "eps"): "eps or None"}
ROLES |= {(f"{op}_backward", "out"): "out or pair" for op in OPS if "relu" in op}
ROLES |= {(op, "out"): "8-bit out" for op in ("quantized_batch_norm", "quantized_batch_norm_relu")}
ROLES |= {(op, "axis"): "later axis" for op in ("group_norm", "instance_norm")}


class Call(NamedTuple):
    """A call that is right, whose arguments can be spoiled."""

    name: str
    op: str
    """How its messages begin, and whose faults its arguments have."""
    function: Callable[..., Any]
    make: Callable[[Shape], Arguments]
    """Good arguments for an x of this shape, the same each time, in memory of their own."""

    def faults(self, argument: str) -> list[Fault]:
        return BY_ARGUMENT[ROLES.get((self.op, argument), argument)]

    def spoiled(self, *spoiled: tuple[str, Fault]) -> Arguments:
        """Good arguments, some of them spoiled."""
        arguments = self.make(SHAPE)
        return arguments | {argument: fault.spoil(arguments[argument]) for argument, fault in spoiled}

    def blamed(self, *spoiled: tuple[str, Fault]) -> str:
        """Which arguments the error may name: a shape is wrong beside another, and a cache stands for its x."""
        if any(fault.relative for _, fault in spoiled):
            return "|".join(["x", *self.make(SHAPE)])
        return "|".join(argument for argument, _ in spoiled)


def good(op: str, argument: str, shape: Shape) -> Any:
    """A good value of one argument, for an x of this shape."""
    if argument == "normalized_shape":
        return tuple(shape[2:])
    if argument in SETTINGS:
        return SETTINGS[argument]
    rng = np.random.default_rng(zlib.crc32(argument.encode()))
    if argument == "xq":
        return rng.integers(0, 100, shape, dtype=np.uint8)
    if argument in ("x", "addend", "dy"):
        return rng.normal(0.5, 2, shape)
    return rng.uniform(0.5, 2, shape[2:] if op in ("layer_norm", "rms_norm") else shape[1:2])


def arguments(op: str, names: str, shape: Shape) -> Arguments:
    given = {name: good(op, name, shape) for name in names.split()}
    like = given["xq"] if "xq" in given else given["x"]
    return given | {"out": np.full_like(like, 77)}


def backward_arguments(op: str, shape: Shape) -> Arguments:
    given = arguments(op, OPS[op], shape)
    del given["out"]
    _, cache = getattr(an, f"{op}_forward")(**given)
    return {"dy": good(op, "dy", shape), "cache": cache, "out": np.full(shape, 77.0)}


def running_arguments(op: str, shape: Shape) -> Arguments:
    running = {name: good(op, name, shape) for name in ("running_mean", "running_var")}
    return running | {"cache": backward_arguments(op, shape)["cache"], "momentum": SETTINGS["momentum"]}


def _calls() -> list[Call]:
    calls = []
    for op, names in OPS.items():

        def forward(shape: Shape, op: str = op, names: str = names) -> Arguments:
            return arguments(op, names, shape)

        def backward(shape: Shape, op: str = op) -> Arguments:
            return backward_arguments(op, shape)

        calls.append(Call(op, op, getattr(an, op), forward))
        calls.append(Call(f"{op}_forward", op, getattr(an, f"{op}_forward"), forward))
        calls.append(Call(f"{op}_backward", f"{op}_backward", getattr(an, f"{op}_backward"), backward))
    for op in ("quantized_batch_norm", "quantized_batch_norm_relu"):
        calls.append(Call(op, op, getattr(an, op), lambda shape, op=op: arguments(op, QUANTIZED, shape)))
    for op in ("batch_norm", "batch_norm_add_relu", "instance_norm"):
        update, name = an.update_running_stats, f"update_running_stats of {op}"
        calls.append(Call(name, "update_running_stats", update, lambda shape, op=op: running_arguments(op, shape)))
    return calls


CALLS = _calls()
