"""Bad state for every layer: one RuntimeError for all its faults, nothing loaded; or exactly what was asked for."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from bad_input.faults import LAYOUTS, NO_NUMBERS, NOT_ARRAYS, SHAPES, Fault, cast, faults
from bad_input.subjects import SUBJECTS, Subject, drawn
from bad_input.witness import assert_documented, noted, picture

EVERY = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.cls)
REAL = ("longdouble", "float8", "int4")  # numbers that are copied into the layer's dtype
REFUSED = [
    *(fault for fault in NOT_ARRAYS if fault.name != "of another library"),
    *(fault for fault in faults(NO_NUMBERS, RuntimeError) if fault.name not in REAL),
    *SHAPES,
]
LEGAL = [*LAYOUTS, *faults({name: cast(name) for name in ("f2", "f4", "f8", "longdouble", "i4", "u1")}, plain=np.array)]


def good_state(subject: Subject) -> OrderedDict[str, Any]:
    state = subject.build().state_dict()
    for name, array in state.items():
        state[name] = drawn(name, array.shape, 3).astype(array.dtype)
    return state


def names(state: Any) -> list[str]:
    """One entry of each kind: the others are loaded the same way."""
    return [name for name in ("weight", "running_var", "num_batches_tracked", "scale") if name in state]


def assert_not_loaded(layer: Any, state: Any, *words: str) -> None:
    """Loading raises one RuntimeError that holds all the words, and changes nothing."""
    held = [layer, state]
    before = picture(held)
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state)
    assert_documented(caught.value, (RuntimeError,), "load_state_dict", ".*")
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert picture(held) == before, "the layer or the state has changed"


@EVERY
def test_an_entry_that_cannot_be_loaded_is_refused_and_nothing_is_loaded(subject: Subject) -> None:
    layer = subject.used(training=True)
    complaints: list[str] = []
    for name in names(good_state(subject)):
        for fault in REFUSED:
            if fault in SHAPES and name in ("num_batches_tracked", "scale"):
                continue  # no dimensions to be wrong; see below
            state = good_state(subject)
            state[name] = fault.spoil(state[name])
            with noted(complaints, f"{name} is {fault.name}"):
                assert_not_loaded(layer, state, name)
    assert not complaints, "\n".join(complaints)


@EVERY
def test_an_unusual_but_legal_entry_is_loaded_as_a_plain_one(subject: Subject) -> None:
    complaints: list[str] = []
    for name in names(good_state(subject)):
        for fault in LEGAL:
            if fault in LAYOUTS and name in ("num_batches_tracked", "scale"):
                continue  # no dimensions to lay out
            with noted(complaints, f"{name} is {fault.name}"):
                layer, state = subject.build(), good_state(subject)
                state[name] = fault.spoil(state[name])
                before = picture(state)
                target = layer.state_dict()[name]
                layer.load_state_dict(state)
                assert layer.state_dict()[name] is target, "not loaded in place"
                np.testing.assert_array_equal(target, np.array(state[name]).astype(target.dtype))
                assert picture(state) == before, "the state was written to"
    assert not complaints, "\n".join(complaints)


@EVERY
def test_all_faults_of_a_state_are_named_at_once(subject: Subject) -> None:
    layer, state = subject.used(training=True), good_state(subject)
    state["weight"] = np.ones(99)
    state["nobody's"] = np.ones(3)
    words = ["weight", "size mismatch", "Unexpected key(s)", '"nobody\'s"']
    if "bias" in state:
        del state["bias"]
        words += ["Missing key(s)", '"bias"']
    assert_not_loaded(layer, state, *words)


NOT_STATES: dict[str, Any] = {
    "None": None,
    "a list": [],
    "pairs": [("weight", np.ones(3))],
    "a string": "weight",
    "an array": np.ones(3),
    "a layer": an.BatchNorm(3),
}


@pytest.mark.parametrize("state", NOT_STATES.values(), ids=NOT_STATES)
def test_what_is_no_mapping_is_refused(state: Any) -> None:
    layer = an.BatchNorm(3)
    before = picture(layer)
    with pytest.raises(TypeError) as caught:
        layer.load_state_dict(state)
    assert_documented(caught.value, (TypeError,), "load_state_dict", "state_dict")
    assert picture(layer) == before


@pytest.mark.parametrize("key", [1, None, ("weight",), b"weight"], ids=repr)
def test_a_key_that_is_no_string_is_unexpected(key: Any) -> None:
    layer = an.BatchNorm(3)
    assert_not_loaded(layer, {**layer.state_dict(), key: np.ones(3)}, "Unexpected key(s)", str(key))


# -- values that the layer's dtype does not hold ---------------------------------------------------------------

TOO_LARGE = {"weight": 1e300, "running_var": -1e300}
NO_COUNT = {"nan": np.nan, "inf": np.inf, "beyond int64": 1e300}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_value_beyond_the_layers_dtype_is_loaded_as_infinity(name: str) -> None:
    layer = an.BatchNorm(3)
    state = {key: np.array(array, np.float64) for key, array in layer.state_dict().items()}
    state[name][1] = TOO_LARGE[name]
    layer.load_state_dict(state)
    assert getattr(layer, name)[1] == np.copysign(np.inf, TOO_LARGE[name])


@pytest.mark.parametrize("count", NO_COUNT.values(), ids=NO_COUNT)
def test_a_counter_that_is_no_integer_is_refused_and_nothing_is_loaded(count: float) -> None:
    layer = an.BatchNorm(3)
    state = {key: np.array(array, np.float64) + 5 for key, array in layer.state_dict().items()}
    assert_not_loaded(layer, state | {"num_batches_tracked": np.array(count)}, "num_batches_tracked")


def test_a_layer_may_load_its_own_arrays_under_other_names() -> None:
    layer = an.BatchNorm(3)
    layer.weight[:], layer.bias[:] = 2, 3
    layer.load_state_dict(layer.state_dict() | {"weight": layer.bias, "bias": layer.weight})
    assert layer.weight.tolist() == [3, 3, 3]
    assert layer.bias.tolist() == [2, 2, 2]


def test_a_layer_may_load_its_own_arrays_the_other_way_round() -> None:
    layer = an.BatchNorm(3)
    layer.weight[:] = 1, 2, 3
    layer.load_state_dict(layer.state_dict() | {"weight": layer.weight[::-1]})
    assert layer.weight.tolist() == [3, 2, 1]


# -- metadata and damaged layers -------------------------------------------------------------------------------


class Saved(OrderedDict[str, Any]):
    """A state_dict with metadata of anybody's making."""

    _metadata: Any


METADATA = {"None": None, "a list": [], "version None": {"": {"version": None}}, "no version": {"": {}}}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_metadata_that_says_nothing_means_the_first_version(metadata: Any) -> None:
    layer = an.BatchNorm(3)
    state = Saved(layer.state_dict())
    del state["num_batches_tracked"]
    state._metadata = metadata
    layer.num_batches_tracked[...] = 5
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0


DAMAGED: list[Fault] = [fault for fault in NOT_ARRAYS if fault.name in ("a list", "a string", "an object")]


@pytest.mark.parametrize("fault", DAMAGED, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_layer_whose_attribute_is_no_array_refuses_a_good_state(name: str, fault: Fault) -> None:
    layer, state = an.BatchNorm(3), an.BatchNorm(3).state_dict()
    setattr(layer, name, fault.spoil(getattr(layer, name)))
    assert_not_loaded(layer, state, name)
