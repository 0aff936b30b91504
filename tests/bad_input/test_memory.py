"""`out` in the memory of another argument: allowed as the contract says, else refused and nothing written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from bad_input.calls import CALLS, OPS, SHAPE, Arguments, Call, backward_arguments
from bad_input.witness import assert_refused, assert_same_answer, noted, picture

WITH_OUT = [call for call in CALLS if "out" in call.make(SHAPE)]
EVERY_CALL = pytest.mark.parametrize("call", WITH_OUT, ids=lambda call: call.name)


def replaced(arguments: Arguments, name: str, value: Any) -> Arguments:
    """The arguments with another value for one of them, or for a field of the cache ("cache.mean")."""
    owner, _, field = name.partition(".")
    return arguments | {owner: arguments[owner]._replace(**{field: value}) if field else value}


def arrays(arguments: Arguments) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays but out: of the arguments, and of the cache among them."""
    named = dict(arguments)
    cache = named.get("cache")
    if cache is not None:
        named |= {f"cache.{field}": value for field, value in cache._asdict().items()}
    return {name: value for name, value in named.items() if isinstance(value, np.ndarray) and name != "out"}


def may_be_out(call: Call) -> set[str]:
    """The arguments that `out` may be, by the docstrings."""
    if call.name.endswith("_backward"):
        return {"dy"}
    allowed = {"addend"} if "add_relu" in call.name else set()
    return allowed if call.name.endswith("_forward") else allowed | {"x", "xq"}  # a cache would refer to x


@EVERY_CALL
def test_out_may_be_an_input_that_is_read_before_it_is_written(call: Call) -> None:
    for name in may_be_out(call) & set(call.make(SHAPE)):
        expected = call.function(**call.make(SHAPE))
        arguments = call.make(SHAPE)
        arguments["out"] = arguments[name]
        assert_same_answer(call.function(**arguments), expected)


@EVERY_CALL
def test_out_must_not_be_any_other_array(call: Call) -> None:
    complaints: list[str] = []
    for name, value in arrays(call.make(SHAPE)).items():
        if name not in may_be_out(call):
            with noted(complaints, name):
                arguments, (out, inner) = call.make(SHAPE), around(value, call)
                arguments = replaced(arguments, name, inner) | {"out": out}
                assert_refused(call.function, arguments, (ValueError,), call.op, "out")
    assert not complaints, "\n".join(complaints)


def around(value: np.ndarray[Any, Any], call: Call) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """An out, and a copy of `value` in its memory: from its first byte on."""
    out = call.make(SHAPE)["out"]
    memory = np.zeros(max(out.nbytes, value.nbytes), np.uint8)
    inner = memory[: value.nbytes].view(value.dtype).reshape(value.shape)
    inner[...] = value
    return memory[: out.nbytes].view(out.dtype).reshape(out.shape), inner


@EVERY_CALL
def test_out_must_not_overlap_a_part_of_any_array(call: Call) -> None:
    complaints: list[str] = []
    for name, value in arrays(call.make(SHAPE)).items():
        with noted(complaints, name):
            out = call.make(SHAPE)["out"]
            memory = np.zeros(out.nbytes + value.nbytes, np.uint8)
            start = out.nbytes - 8 * value.itemsize  # the last bytes of out are the first of the other
            inner = memory[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
            inner[...] = value
            overlapping = memory[: out.nbytes].view(out.dtype).reshape(out.shape)
            arguments = replaced(call.make(SHAPE), name, inner) | {"out": overlapping}
            assert_refused(call.function, arguments, (ValueError,), call.op, "out")
    assert not complaints, "\n".join(complaints)


@EVERY_CALL
def test_overlap_is_judged_by_memory_bounds(call: Call) -> None:
    name = next(iter(call.make(SHAPE)))  # x, xq or dy
    arguments = call.make(SHAPE)
    interleaved = np.zeros((*SHAPE, 2), arguments["out"].dtype)
    interleaved[..., 0] = arguments[name]
    arguments |= {name: interleaved[..., 0], "out": interleaved[..., 1]}
    assert_refused(call.function, arguments, (ValueError,), call.op, "out")


# -- two results: dx and daddend -------------------------------------------------------------------------------

PAIRED = pytest.mark.parametrize("op", [op for op in OPS if "add_relu" in op])


@PAIRED
def test_the_pair_of_results_is_checked_as_each_of_them(op: str) -> None:
    backward = getattr(an, f"{op}_backward")
    good, spare, small = np.full(SHAPE, 77.0), np.zeros((SHAPE[0] + 1, *SHAPE[1:])), np.zeros(SHAPE, np.float32)
    wrong: dict[str, tuple[Any, type[Exception]]] = {
        "no entry": ((), ValueError),
        "one entry": ((good,), ValueError),
        "three entries": ((good, None, None), ValueError),
        "a list": ([good, None], TypeError),
        "the same array twice": ((good, good), ValueError),
        "two that overlap": ((spare[:-1], spare[1:]), ValueError),
        "a daddend of another dtype": ((good, small), TypeError),
        "a daddend of another shape": ((good, spare), ValueError),
        "a dx that is a list": (([1.0], good), TypeError),
        "a daddend that is a list": ((good, [1.0]), TypeError),
    }
    complaints: list[str] = []
    for name, (out, refused) in wrong.items():
        with noted(complaints, name):
            assert_refused(backward, backward_arguments(op, SHAPE) | {"out": out}, (refused,), f"{op}_backward", "out")
    assert not complaints, "\n".join(complaints)


@PAIRED
def test_both_results_cannot_be_dy(op: str) -> None:
    arguments = backward_arguments(op, SHAPE)
    arguments["out"] = (arguments["dy"], arguments["dy"])
    assert_refused(getattr(an, f"{op}_backward"), arguments, (ValueError,), f"{op}_backward", "out")


@PAIRED
def test_daddend_has_no_place_where_there_was_no_addend(op: str) -> None:
    statistics = {name: np.ones(3) for name in ("mean", "var") if "frozen" in op}
    _, cache = getattr(an, f"{op}_forward")(np.ones(SHAPE), addend=None, **statistics)
    arguments = {"dy": np.ones(SHAPE), "cache": cache, "out": (np.zeros(SHAPE), np.zeros(SHAPE))}
    assert_refused(getattr(an, f"{op}_backward"), arguments, (ValueError,), f"{op}_backward", "out")


# -- inputs that share memory with each other ------------------------------------------------------------------


def test_inputs_may_be_one_another() -> None:
    x = np.random.default_rng(0).normal(size=(4, 4))
    row = x[0]
    before = picture(x)
    found = an.batch_norm_add_relu_forward(x, x, row, row)
    assert_same_answer(found, an.batch_norm_add_relu_forward(x.copy(), x.copy(), row.copy(), row.copy()))
    _, cache = found
    shared = an.update_running_stats(row, row, cache)
    assert_same_answer(shared, an.update_running_stats(row.copy(), row.copy(), cache))
    assert picture(x) == before
