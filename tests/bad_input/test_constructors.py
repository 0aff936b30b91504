"""Bad arguments of every layer's constructor, of `from_float`, and of the methods that change a layer."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from bad_input.faults import BY_ARGUMENT, COMM, MOMENTUM, NOT_SCALARS, Fault, values
from bad_input.subjects import SUBJECTS, Subject
from bad_input.witness import assert_documented, assert_refused, noted, picture

# "num_features a bool, float or < 0, num_groups < 1" are ValueErrors, whatever the common rule says of kinds.
SIZE = [
    *values({"True": True, "NumPy's True": np.True_, "a float": 3.0, "NumPy's float": np.float64(3)}, ValueError),
    *values(NOT_SCALARS | {"None": None}, ValueError, TypeError),
    *values({"negative": -1, "huge and negative": -(10**30)}, ValueError),
]
XP = values({"a string": "numpy", "an array": np.ones(3), "a number": 3, "another module": pytest}, TypeError)
DTYPE = values(
    {"int64": np.int64, "complex128": np.complex128, "bool": bool, "object": object, "longdouble": np.longdouble}
    | {
        "no dtype": "nonsense",
        "strings": "U3",
        "times": "datetime64[s]",
        "byte-swapped": np.dtype("f4").newbyteorder(),
        "a number": 3,
    },
    TypeError,
)
DEVICE = values({"no device": "nonsense", "a number": 3}, TypeError, ValueError)
ARGUMENTS: dict[str, list[Fault]] = {
    "num_features": SIZE,
    "num_channels": SIZE,
    "num_groups": [*SIZE, *values({"0": 0, "no divisor": 4}, ValueError)],
    "normalized_shape": BY_ARGUMENT["normalized_shape"],
    "eps": BY_ARGUMENT["eps"],
    "momentum": MOMENTUM,
    "axis": BY_ARGUMENT["axis"],
    "comm": [fault for fault in COMM if "mpi4py" not in fault.name],  # layers wrap those
    "xp": XP,
    "dtype": DTYPE,
    "device": DEVICE,
}
# What a constructor cannot know before it sees an input: it refuses them then.
LATER = {("axis", name) for name in ("too large", "too small", "huge")} | {
    ("normalized_shape", name) for name in ("a list", "one size alone", "turned", "too many")
}


POSITIONAL = {
    "GroupNorm": ("num_groups", "num_channels"),
    "LayerNorm": ("normalized_shape",),
    "RMSNorm": ("normalized_shape",),
}


def good_arguments(subject: Subject) -> dict[str, Any]:
    names = POSITIONAL.get(subject.cls, ("num_features",))
    return dict(zip(names, subject.positional, strict=True)) | subject.keywords


def constructor_faults(subject: Subject, argument: str) -> list[Fault]:
    faults = ARGUMENTS[argument]
    if argument == "eps" and subject.cls == "RMSNorm":
        faults = BY_ARGUMENT["eps or None"]
    return [f for f in faults if f.plain is None and (argument, f.name) not in LATER]


@pytest.mark.parametrize(
    ("subject", "argument"),
    [
        pytest.param(subject, argument, id=f"{argument} of {subject.cls}")
        for subject in SUBJECTS
        for argument in ARGUMENTS
        if argument in inspect.signature(getattr(an, subject.cls)).parameters
    ],
)
def test_a_bad_argument_of_a_constructor_is_refused_by_name(subject: Subject, argument: str) -> None:
    complaints: list[str] = []
    blamed = "|".join(ARGUMENTS) if argument.startswith("num_") else argument
    for fault in constructor_faults(subject, argument):
        with noted(complaints, fault.name):
            arguments = good_arguments(subject) | {argument: fault.spoil(None)}
            assert_refused(getattr(an, subject.cls), arguments, fault.refused, subject.cls, blamed)
    assert not complaints, "\n".join(complaints)


# -- from_float ------------------------------------------------------------------------------------------------

QUANTIZED = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.is_quantized], ids=lambda subject: subject.cls)
NOT_BATCH_NORMS = values(
    {"None": None, "an array": np.ones(3), "the class": an.BatchNorm2d, "a GroupNorm": an.GroupNorm(1, 3)}, TypeError
) + values({"without statistics": an.BatchNorm2d(3, track_running_stats=False)}, ValueError)
FROM_FLOAT = {
    "layer": NOT_BATCH_NORMS,
    # what float32, the buffer's dtype, holds as 0 or infinity could not be used
    "scale": [*BY_ARGUMENT["y_scale"], *values({"too small": 1e-60, "too large": 1e60}, ValueError)],
    "zero_point": [f for f in BY_ARGUMENT["y_zero_point"] if f.name not in ("too large", "too small")],
}


@pytest.mark.parametrize("argument", FROM_FLOAT)
@QUANTIZED
def test_from_float_refuses_a_bad_argument_by_name(subject: Subject, argument: str) -> None:
    cls, layer = getattr(an, subject.cls), an.BatchNorm2d(3)
    complaints: list[str] = []
    for fault in FROM_FLOAT[argument]:
        if fault.plain is None:
            with noted(complaints, fault.name):
                good = {"layer": layer, "scale": 0.05, "zero_point": 7}
                arguments = good | {argument: fault.spoil(good[argument])}
                assert_refused(cls.from_float, arguments, fault.refused, rf"{subject.cls}\.from_float", argument)
    assert not complaints, "\n".join(complaints)


# -- methods ---------------------------------------------------------------------------------------------------

METHODS = {
    "train with a string": (lambda layer: layer.train("yes"), ValueError, "mode"),
    "train with a number": (lambda layer: layer.train(1), ValueError, "mode"),
    "a child that is none": (lambda layer: layer.add_module("child", 3), TypeError, "child"),
    "a name with a dot": (lambda layer: layer.register_buffer("a.b", np.ones(3)), ValueError, "name"),
    "an empty name": (lambda layer: layer.register_parameter("", np.ones(3)), ValueError, "name"),
    "a name that is none": (lambda layer: layer.register_buffer(3, np.ones(3)), ValueError, "name"),
    "no dtype": (lambda layer: layer.to(dtype="nonsense"), TypeError, "dtype"),
    "an integer dtype": (lambda layer: layer.to(dtype=np.int64), TypeError, "dtype"),
    "a device of no library": (lambda layer: layer.to("nonsense"), (TypeError, ValueError), "device"),
    "a module that is no library": (lambda layer: layer.to(pytest), TypeError, "xp"),
}


@pytest.mark.parametrize(("call", "refused", "argument"), METHODS.values(), ids=METHODS)
def test_a_method_refuses_a_bad_argument_and_the_layer_stays_as_it_was(call: Any, refused: Any, argument: str) -> None:
    layer = SUBJECTS[2].used(training=True)
    kinds = refused if isinstance(refused, tuple) else (refused,)
    speakers = r"BatchNorm2d(\.\w+)?|to|add_module|register_\w+"
    assert_refused(call, {"layer": layer}, kinds, speakers, argument)


@pytest.mark.parametrize("modules", [(3,), ("x",), (None,), ({"a": 3},), (an.BatchNorm2d(3), "x")])
def test_a_sequence_refuses_what_is_no_module(modules: tuple[Any, ...]) -> None:
    before = picture(modules)
    with pytest.raises(TypeError, match=r"Sequential: .* must be a Module, got ") as caught:
        an.Sequential(*modules)
    assert_documented(caught.value, (TypeError,), "Sequential", ".*")
    assert picture(modules) == before


@pytest.mark.parametrize("comm", ["world", 3, object()])
def test_a_bad_communicator_is_refused_wherever_one_is_given(comm: Any) -> None:
    layer = an.SyncBatchNorm(3, comm=an.distributed.SELF)
    calls = {
        "comm": lambda: setattr(layer, "comm", comm),
        "convert": lambda: an.SyncBatchNorm.convert_sync_batchnorm(layer, comm),
        "as_communicator": lambda: an.distributed.as_communicator(comm),
        "MPICommunicator": lambda: an.distributed.MPICommunicator(comm),
    }
    before = picture(layer)
    for name, call in calls.items():
        with pytest.raises(TypeError, match=r"comm must be .*, got .+"):
            call()
        assert picture(layer) == before, name
