"""Bad input to every layer: the documented error and a layer that is byte by byte the same, or the right answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bad_input.faults import NOT_ARRAYS, NOT_FLOATING, SHAPES, STATISTIC, Fault
from bad_input.subjects import ATTRIBUTES, SUBJECTS, Subject, drawn
from bad_input.witness import assert_documented, assert_refused, assert_same_answer, noted, picture

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
EVERY = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.cls)
DIFFERENTIABLE = pytest.mark.parametrize(
    "subject", [s for s in SUBJECTS if not s.is_quantized], ids=lambda subject: subject.cls
)
# Not needed in eval, where running statistics do not move: a bad one may be refused or stay unused.
MOVES_ONLY = {"momentum", "num_batches_tracked"}
FAULTS = {subject.cls: subject.attributes() for subject in SUBJECTS}


def same_state(layer: Any, twin: Any) -> None:
    """Equal parameters and buffers, wherever they lie, but for those that were given another dtype."""
    for (name, a), b in zip(layer.state_dict().items(), twin.state_dict().values(), strict=True):
        if np.asarray(a).dtype == np.asarray(b).dtype:
            np.testing.assert_allclose(a, b, rtol=1e-13, err_msg=name)  # sums of up to 160 values, in another order


def check_call(subject: Subject, layer: Any, inputs: dict[str, Fault], attributes: dict[str, Fault]) -> bool:
    """With these spoiled, the layer raises one of their errors and is unchanged, or does what plain values do.

    Returns whether it did, so that it is not the same layer any more.
    """
    given, plain = subject.inputs(), subject.inputs()
    for name, fault in inputs.items():
        given[name] = fault.spoil(given[name])
        plain[name] = (fault.plain or np.array)(fault.spoil(plain[name]))
    good = {name: getattr(layer, name) for name in attributes}
    for name, fault in attributes.items():
        setattr(layer, name, fault.spoil(good[name]))
    before, given_before = picture(layer), picture(given)
    spoiled = inputs | attributes
    try:
        y = layer(**given)
    except Exception as error:
        refused = tuple(kind for fault in spoiled.values() for kind in fault.refused)
        assert_documented(error, refused, subject.speakers, blamed(subject, spoiled))
        assert picture(layer) == before, "the layer has changed"
        assert picture(given) == given_before, "an argument was written to"
        for name, value in good.items():
            setattr(layer, name, value)
        return False
    assert picture(given) == given_before, "an argument was written to"
    healed = len(spoiled) > 1  # two sizes that are wrong alone may fit each other
    wrong = [f"{n} is {f.name}" for n, f in spoiled.items() if not (f.plain or (f.relative and healed))]
    if not layer.training and MOVES_ONLY & set(attributes):  # not looked at, so neither refused nor used
        wrong = [text for text in wrong if text.partition(" ")[0] not in MOVES_ONLY]
        assert not wrong, f"accepted: {wrong}"
        return True
    assert not wrong, f"accepted: {wrong}"
    twin = subject.used(layer.training)
    for name, fault in attributes.items():
        setattr(twin, name, (fault.plain or np.array)(fault.spoil(getattr(twin, name))))
    assert_same_answer(y, twin(**plain))
    same_state(layer, twin)
    return True


def blamed(subject: Subject, spoiled: dict[str, Fault]) -> str:
    """Which names the error may hold: a size is wrong beside another, and an op calls some attributes otherwise."""
    relative = any(fault.relative for fault in spoiled.values()) or any(name.startswith("num_") for name in spoiled)
    names = {*subject.inputs(), *ATTRIBUTES} if relative else set(spoiled)
    in_ops = {"running_mean": "mean", "running_var": "var", "scale": "y_scale", "zero_point": "y_zero_point"}
    return "|".join(names | {in_ops[name] for name in names & in_ops.keys()})


def check_all(subject: Subject, training: bool, where: str, name: str, faults: list[Fault]) -> None:
    complaints: list[str] = []
    layer = subject.used(training)
    for fault in faults:
        spoiled = {"inputs": {}, "attributes": {}} | {where: {name: fault}}
        changed = True
        with noted(complaints, f"{name} is {fault.name}"):
            changed = check_call(subject, layer, **spoiled)
        if changed:
            layer = subject.used(training)
    assert not complaints, "\n".join(complaints)


@MODES
@pytest.mark.parametrize(
    ("subject", "argument"),
    [pytest.param(subject, name, id=f"{name} of {subject.cls}") for subject in SUBJECTS for name in subject.inputs()],
)
def test_a_bad_input_is_refused_and_the_layer_stays_as_it_was(subject: Subject, argument: str, training: bool) -> None:
    check_all(subject, training, "inputs", argument, subject.input_faults(argument))


@MODES
@pytest.mark.parametrize(
    ("subject", "attribute"),
    [
        pytest.param(subject, name, id=f"{name} of {subject.cls}")
        for subject in SUBJECTS
        for name in FAULTS[subject.cls]
    ],
)
def test_an_attribute_replaced_by_a_bad_one_is_refused_and_the_layer_stays_as_it_was(
    subject: Subject, attribute: str, training: bool
) -> None:
    check_all(subject, training, "attributes", attribute, FAULTS[subject.cls][attribute])


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if FAULTS[s.cls].keys() >= MOVES_ONLY], ids=lambda s: s.cls)
def test_a_counter_below_zero_has_no_cumulative_mean(subject: Subject) -> None:
    layer = subject.used(training=True)
    layer.momentum, layer.num_batches_tracked = None, np.array(-1)
    assert_refused(layer, subject.inputs(), (ValueError,), subject.speakers, "num_batches_tracked", layer)


@st.composite
def two_faults(draw: st.DrawFn) -> tuple[Subject, bool, dict[str, Fault], dict[str, Fault]]:
    subject = draw(st.sampled_from(SUBJECTS))
    known = FAULTS[subject.cls]
    places = draw(st.permutations([*subject.inputs(), *known]))[:2]
    inputs = {name: draw(st.sampled_from(subject.input_faults(name))) for name in places if name not in known}
    replaced = {name: draw(st.sampled_from(known[name])) for name in places if name in known}
    return subject, draw(st.booleans()), inputs, replaced


@settings(max_examples=max(500, settings().max_examples))
@given(two_faults())
def test_of_two_faults_of_a_layer_one_is_refused(
    drawn: tuple[Subject, bool, dict[str, Fault], dict[str, Fault]],
) -> None:
    subject, training, inputs, attributes = drawn
    check_call(subject, subject.used(training), inputs, attributes)


# -- backward --------------------------------------------------------------------------------------------------


@MODES
@DIFFERENTIABLE
def test_a_bad_dy_is_refused_and_the_cache_stays_for_a_good_one(subject: Subject, training: bool) -> None:
    layer, twin = subject.used(training), subject.used(training)
    dy = drawn("dy", subject.shape)
    complaints: list[str] = []
    for fault in STATISTIC:
        if fault.plain is None:
            with noted(complaints, fault.name):
                arguments = {"dy": fault.spoil(dy)}
                assert_refused(layer.backward, arguments, fault.refused, subject.speakers, "dy", layer)
    assert not complaints, "\n".join(complaints)
    assert_same_answer(layer.backward(dy), twin.backward(dy))
    assert_same_answer(tuple(layer.grads.values()), tuple(twin.grads.values()))


@MODES
@DIFFERENTIABLE
def test_an_unusual_but_legal_dy_gives_the_gradients_of_a_plain_one(subject: Subject, training: bool) -> None:
    complaints: list[str] = []
    for fault in STATISTIC:
        if fault.plain is not None:
            with noted(complaints, fault.name):
                layer, twin = subject.used(training), subject.used(training)
                dy = fault.spoil(drawn("dy", subject.shape))
                before = picture(dy)
                if fault.refused:  # byte-swapped: refused or converted
                    assert_refused(layer.backward, {"dy": dy}, fault.refused, subject.speakers, "dy", layer)
                    continue
                assert_same_answer(layer.backward(dy), twin.backward(fault.plain(dy)))
                assert_same_answer(tuple(layer.grads.values()), tuple(twin.grads.values()))
                assert picture(dy) == before, "dy was written to"
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if "Instance" in s.cls], ids=lambda subject: subject.cls)
def test_the_dy_of_an_instance_norm_is_batched_where_its_x_was(subject: Subject, batched: bool) -> None:
    layer = subject.build()
    x = drawn("x", (1, *subject.shape[1:]))
    y = layer(x if batched else x[0])
    dy = np.ones_like(y)
    other = {"dy": dy[0] if batched else dy[None]}
    assert_refused(layer.backward, other, (ValueError,), subject.speakers, "dy", layer)


@EVERY
def test_backward_without_a_forward_is_refused(subject: Subject) -> None:
    layer = subject.build()
    before = picture(layer)
    with pytest.raises(RuntimeError, match=f"{subject.cls}: "):
        layer.backward(np.ones(subject.shape))
    assert picture(layer) == before


GRADIENT = [*NOT_ARRAYS, *NOT_FLOATING, *SHAPES]


@MODES
@DIFFERENTIABLE
def test_a_gradient_replaced_by_a_bad_one_is_refused_and_the_layer_stays_as_it_was(
    subject: Subject, training: bool
) -> None:
    complaints: list[str] = []
    for name in [name for name, held in subject.used(training).grads.items() if held is not None]:
        layer = subject.used(training)
        for fault in GRADIENT:
            with noted(complaints, f"grads[{name!r}] is {fault.name}"):
                layer.grads[name] = fault.spoil(np.ones(layer.state_dict()[name].shape))
                arguments = {"dy": drawn("dy", subject.shape)}
                assert_refused(layer.backward, arguments, fault.refused, subject.speakers, name, layer)
    assert not complaints, "\n".join(complaints)
