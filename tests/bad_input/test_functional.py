"""Bad input to every functional op: the documented error and nothing written, or the right answer."""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bad_input.calls import CALLS, SHAPE, Arguments, Call
from bad_input.faults import Fault
from bad_input.witness import assert_documented, assert_refused, assert_same_answer, leaves, noted, picture

Spoiled = tuple[str, Fault]

ARGUMENTS = pytest.mark.parametrize(
    ("call", "argument"),
    [pytest.param(call, argument, id=f"{argument} of {call.name}") for call in CALLS for argument in call.make(SHAPE)],
)
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


@ARGUMENTS
def test_a_bad_argument_is_refused_by_name_and_nothing_is_written(call: Call, argument: str) -> None:
    complaints: list[str] = []
    for fault in call.faults(argument):
        if fault.plain is None:
            with noted(complaints, fault.name):
                blamed = call.blamed((argument, fault))
                assert_refused(call.function, call.spoiled((argument, fault)), fault.refused, call.op, blamed)
    assert not complaints, "\n".join(complaints)


@ARGUMENTS
def test_an_unusual_but_legal_argument_gives_the_answer_of_a_plain_one(call: Call, argument: str) -> None:
    complaints: list[str] = []
    for fault in call.faults(argument):
        if fault.plain is not None:
            with noted(complaints, fault.name):
                check((argument, fault), call=call)
    assert not complaints, "\n".join(complaints)


def check(*spoiled: Spoiled, call: Call) -> None:
    """With these arguments spoiled, the call raises one of their errors, or gives the answer of plain arguments."""
    arguments, plain = call.spoiled(*spoiled), call.spoiled(*spoiled)
    inputs = [value for name, value in arguments.items() if name != "out"]
    before, out_before = picture(inputs), picture(arguments.get("out"))
    try:
        result = call.function(**arguments)
    except Exception as error:
        refused = tuple(kind for _, fault in spoiled for kind in fault.refused)
        assert_documented(error, refused, call.op, call.blamed(*spoiled))
        assert picture(arguments.get("out")) == out_before, "out was written to"
    else:
        wrong = [f"{name} is {fault.name}" for name, fault in spoiled if not (fault.plain or fault.relative)]
        assert not wrong, f"accepted: {wrong}"
        for name, fault in spoiled:
            plain[name] = (fault.plain or np.array)(plain[name])
        out = arguments.get("out")
        assert out is None or next(leaves(result))[1] is out, "the result is not in out"
        assert_same_answer(result, call.function(**plain))
    assert picture(inputs) == before, "an argument was written to"


@st.composite
def two_faults(draw: st.DrawFn) -> tuple[Call, Spoiled, Spoiled]:
    call = draw(st.sampled_from(CALLS))
    one, other = draw(st.permutations(list(call.make(SHAPE))))[:2]
    return (
        call,
        (one, draw(st.sampled_from(call.faults(one)))),
        (other, draw(st.sampled_from(call.faults(other)))),
    )


@settings(max_examples=max(500, settings().max_examples))
@given(two_faults())
def test_of_two_faults_at_once_one_is_refused(drawn: tuple[Call, Spoiled, Spoiled]) -> None:
    call, *spoiled = drawn
    check(*spoiled, call=call)


def in_library(value: Any) -> Any:
    """Arrays, and those of a cache, as arrays of another library."""
    if isinstance(value, np.ndarray):
        return array_api_strict.asarray(value)
    return value.to(array_api_strict) if hasattr(value, "to") else value


def has_arrays(value: Any) -> bool:
    return bool(list(leaves(value)))


@EVERY_CALL
def test_one_numpy_array_among_those_of_another_library_is_refused(call: Call) -> None:
    good: Arguments = {**call.make(SHAPE), "out": None} if "out" in call.make(SHAPE) else call.make(SHAPE)
    there = {name: in_library(value) for name, value in good.items()}
    call.function(**there)
    for name, value in good.items():
        if has_arrays(value):
            assert_refused(call.function, there | {name: value}, (TypeError,), call.op, "|".join(["x", *good]))


@EVERY_CALL
def test_out_is_refused_for_libraries_without_views(call: Call) -> None:
    there = {name: in_library(value) for name, value in call.make(SHAPE).items()}
    if "out" in there:
        assert_refused(call.function, there, (TypeError,), call.op, "out")
