"""Bad arguments of gradcheck and run_ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.testing import gradcheck, run_ranks
from bad_input.faults import BYTES, INTEGERS, LAYOUTS, NO_NUMBERS, NOT_ARRAYS, SWAPPED, cast, faults
from bad_input.witness import assert_refused, noted, picture

# The namespace is the inputs' own: an array of another library is as good, alone.
NOT_INPUTS = [fault for fault in NOT_ARRAYS if fault.name != "of another library"]
DTYPES = faults(NO_NUMBERS | INTEGERS | BYTES | {"f2": cast("f2"), "f4": cast("f4")}, TypeError)


def arguments() -> dict[str, Any]:
    x = np.random.default_rng(0).normal(size=(4, 3))
    return {"forward": an.batch_norm_forward, "backward": an.batch_norm_backward, "inputs": [x, None, None]}


def test_gradcheck_refuses_inputs_that_are_no_float64_arrays() -> None:
    complaints: list[str] = []
    for fault in [*NOT_INPUTS, *DTYPES, *SWAPPED]:
        with noted(complaints, fault.name):
            bad = arguments()
            bad["inputs"][0] = fault.spoil(bad["inputs"][0])
            assert_refused(gradcheck, bad, (TypeError,), "gradcheck", "x")
    assert not complaints, "\n".join(complaints)


def test_gradcheck_takes_inputs_of_any_layout_and_leaves_them() -> None:
    for fault in LAYOUTS:
        if "zero strides" not in fault.name:  # constant along an axis: a gradient that cancels to nothing
            good = arguments()
            good["inputs"][0] = fault.spoil(good["inputs"][0])
            before = picture(good)
            gradcheck(**good)
            assert picture(good) == before


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a mode that is none": ({"mode": "fast"}, ValueError, "mode"),
    "no inputs": ({"inputs": []}, ValueError, "inputs"),
    "inputs of None": ({"inputs": [None]}, ValueError, "inputs"),
    "nan": ({"inputs": [np.array([[1.0], [np.nan]])]}, ValueError, "x"),
    "inf": ({"inputs": [np.array([[1.0], [np.inf]])]}, ValueError, "x"),
    "inputs that are a number": ({"inputs": 3.0}, TypeError, "inputs"),
    "no forward": ({"forward": None}, TypeError, "forward"),
    "a forward that cannot be called": ({"forward": 3}, TypeError, "forward"),
    "a backward that cannot be called": ({"backward": 3}, TypeError, "backward"),
    "no backward": ({"backward": None}, TypeError, "backward"),
    "a negative rtol": ({"rtol": -1.0}, ValueError, "rtol"),
    "an rtol of nan": ({"rtol": np.nan}, ValueError, "rtol"),
    "an atol of nan": ({"atol": np.nan}, ValueError, "atol"),
}


@pytest.mark.parametrize(("change", "refused", "argument"), WRONG.values(), ids=WRONG)
def test_gradcheck_refuses_a_bad_argument_by_name(change: Any, refused: type[Exception], argument: str) -> None:
    assert_refused(gradcheck, arguments() | change, (refused,), "gradcheck", argument)


@pytest.mark.parametrize(
    ("n", "refused"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError), ("2", TypeError), (None, TypeError)],
)
def test_run_ranks_refuses_what_is_no_number_of_ranks(n: Any, refused: type[Exception]) -> None:
    def never(comm: Any) -> None:
        raise AssertionError("a rank was started")

    assert_refused(run_ranks, {"n": n, "function": never}, (refused,), "run_ranks", "n")
