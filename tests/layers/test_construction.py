"""Section A of the contract: constructors, attributes, initial values, resets, repr."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import (
    BATCH_NORMS,
    BATCH_STATISTICS,
    BUFFERS,
    FLOATING,
    FUSED_BATCH_NORMS,
    GROUP_NORM,
    INSTANCE_NORMS,
    LAYER_NORM,
    RMS_NORM,
    RUNNING,
    Case,
    filled,
    held,
    values,
)

_BATCH = "num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True"
_INSTANCE = "num_features, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False"
SIGNATURES = [
    *((case, _BATCH) for case in BATCH_STATISTICS),
    *((case, _INSTANCE) for case in INSTANCE_NORMS),
    (GROUP_NORM, "num_groups, num_channels, eps=1e-05, affine=True"),
    (LAYER_NORM, "normalized_shape, eps=1e-05, elementwise_affine=True, bias=True"),
    (RMS_NORM, "normalized_shape, eps=None, elementwise_affine=True"),
]
AFFINE = {an.LayerNorm: "elementwise_affine", an.RMSNorm: "elementwise_affine"}


def with_affine(case: Case, present: bool, **options: Any) -> Any:
    return case.new(**{AFFINE.get(case.cls, "affine"): present}, **options)


@pytest.mark.behaviour(1)
@pytest.mark.parametrize(("case", "signature"), SIGNATURES, ids=str)
def test_positional_arguments_and_their_defaults_are_torchs(case: Case, signature: str) -> None:
    parameters = inspect.signature(case.cls).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    texts = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional]
    assert ", ".join(texts) == signature


@pytest.mark.behaviour(1)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_positional_arguments_reach_the_attributes_of_their_names(case: Case) -> None:
    layer = case.new(1e-3, 0.2, False, True)
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    assert [getattr(layer, name) for name in names] == [3, 1e-3, 0.2, False, True]


@pytest.mark.behaviour(1)
@pytest.mark.parametrize(
    ("layer", "attributes"),
    [
        (an.GroupNorm(2, 6, 0.25, False), {"num_groups": 2, "num_channels": 6, "eps": 0.25, "affine": False}),
        (an.LayerNorm((4, 5), 0.25, False), {"normalized_shape": (4, 5), "eps": 0.25, "elementwise_affine": False}),
        (an.RMSNorm((4, 5), 0.25, False), {"normalized_shape": (4, 5), "eps": 0.25, "elementwise_affine": False}),
    ],
    ids=["GroupNorm", "LayerNorm", "RMSNorm"],
)
def test_positional_arguments_of_the_other_layers_do_so_too(layer: Any, attributes: dict[str, Any]) -> None:
    assert {name: getattr(layer, name) for name in attributes} == attributes


@pytest.mark.behaviour(1)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_device_and_dtype_are_keywords(case: Case) -> None:
    layer = with_affine(case, True, device="cpu", dtype=np.float64)
    assert {array.dtype for array in layer.parameters()} == {np.dtype(np.float64)}


@pytest.mark.behaviour(1)
@pytest.mark.parametrize("case", [case for case in FLOATING if case is not RMS_NORM], ids=str)
def test_the_keyword_bias_leaves_the_bias_out(case: Case) -> None:
    layer = with_affine(case, True, bias=False)
    assert layer.bias is None
    assert layer.weight is not None


@pytest.mark.behaviour(2)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_changing_eps_later_takes_effect(case: Case, training: bool) -> None:
    built, changed = case.layer(eps=0.5).train(training), case.layer().train(training)
    before = changed(case.x())
    changed.eps = 0.5
    y = changed(case.x())
    assert not np.array_equal(y, before)
    # the first forward in training has moved the buffers, but training does not look at them
    np.testing.assert_array_equal(y, built(case.x()))


@pytest.mark.behaviour(2)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_changing_momentum_later_takes_effect(case: Case) -> None:
    built, changed, unchanged = case.layer(momentum=0.75), case.layer(momentum=0.25), case.layer(momentum=0.25)
    changed.momentum = 0.75
    for layer in (built, changed, unchanged):
        layer(case.x())
    assert held(changed) == held(built)
    assert held(changed) != held(unchanged)


@pytest.mark.behaviour(3)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_an_affine_layer_starts_with_weight_one_and_bias_zero(case: Case) -> None:
    layer = with_affine(case, True)
    shape = {an.GroupNorm: (6,), an.LayerNorm: (4, 5), an.RMSNorm: (4, 5)}.get(case.cls, (3,))
    np.testing.assert_array_equal(layer.weight, np.ones(shape))
    if case is not RMS_NORM:
        np.testing.assert_array_equal(layer.bias, np.zeros(shape))


@pytest.mark.behaviour(3)
@pytest.mark.parametrize("case", [case for case in FLOATING if case is not RMS_NORM], ids=str)
def test_without_affine_weight_and_bias_exist_and_are_none(case: Case) -> None:
    layer = with_affine(case, False)
    assert layer.weight is None
    assert layer.bias is None
    assert not {"weight", "bias"} & set(layer.state_dict())


@pytest.mark.behaviour(4)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_a_tracking_layer_starts_with_mean_zero_variance_one_and_an_int64_counter(case: Case) -> None:
    layer = case.new(track_running_stats=True)
    np.testing.assert_array_equal(layer.running_mean, np.zeros(3))
    np.testing.assert_array_equal(layer.running_var, np.ones(3))
    counter = layer.num_batches_tracked
    assert (counter.dtype, counter.shape, int(counter)) == (np.int64, (), 0)


@pytest.mark.behaviour(4)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_without_tracking_the_three_buffers_exist_are_none_and_stay_out_of_the_state(case: Case) -> None:
    layer = case.new(track_running_stats=False)
    assert [getattr(layer, name) for name in BUFFERS] == [None, None, None]
    assert not set(BUFFERS) & set(layer.state_dict())


@pytest.mark.behaviour(5)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_reset_running_stats_restores_the_buffers_and_nothing_else(case: Case) -> None:
    layer = case.layer()
    parameters = values(layer, "weight", "bias")
    layer.reset_running_stats()
    mean, var, counter = values(layer, *BUFFERS)
    assert (mean.tolist(), var.tolist(), counter.tolist()) == ([0] * 3, [1] * 3, 0)
    np.testing.assert_array_equal(values(layer, "weight", "bias"), parameters)


@pytest.mark.behaviour(5)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_reset_parameters_restores_parameters_and_buffers(case: Case) -> None:
    layer = case.layer()
    layer.reset_parameters()
    expected = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, np.full(array.shape, expected[name]))


@pytest.mark.behaviour(5)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_resets_leave_alone_what_is_switched_off(case: Case) -> None:
    layer = case.layer()
    before = held(layer)
    layer.track_running_stats = layer.affine = False
    layer.reset_running_stats()
    layer.reset_parameters()
    assert held(layer) == before
    plain = case.new(affine=False, track_running_stats=False)
    plain.reset_parameters()
    assert held(plain) == {}


@pytest.mark.behaviour(5)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_a_reset_of_buffers_that_were_never_built_is_a_clear_error(case: Case) -> None:
    layer = filled(case.new(affine=True, track_running_stats=False))
    layer.track_running_stats = True
    before = held(layer)
    for reset in (layer.reset_running_stats, layer.reset_parameters):
        with pytest.raises(RuntimeError, match="track_running_stats"):
            reset()
    assert held(layer) == before


@pytest.mark.behaviour(5)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_a_reset_of_a_weight_that_was_never_built_is_a_clear_error(case: Case) -> None:
    layer = filled(with_affine(case, False))
    setattr(layer, AFFINE.get(case.cls, "affine"), True)
    before = held(layer)
    with pytest.raises(RuntimeError, match="affine"):
        layer.reset_parameters()
    assert held(layer) == before


@pytest.mark.behaviour(6)
@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_eps_must_be_finite_and_not_negative(case: Case, eps: float) -> None:
    with pytest.raises(ValueError, match="eps"):
        case.new(eps=eps)


@pytest.mark.behaviour(6)
@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_momentum_must_lie_between_zero_and_one(case: Case, momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum"):
        case.new(momentum=momentum)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
@pytest.mark.parametrize(("case", "name"), [(case, name) for case in RUNNING for name in ("eps", "momentum")], ids=str)
def test_a_setting_changed_to_nonsense_is_refused_by_the_next_call(case: Case, name: str, value: float) -> None:
    """Behaviours 2, 6 and 19 together, so none of them alone."""
    layer = case.layer()
    before = held(layer)
    setattr(layer, name, -value if name == "eps" and value > 0 else value)
    with pytest.raises(ValueError, match=name):
        layer(case.x())
    assert held(layer) == before


@pytest.mark.behaviour(6)
@pytest.mark.parametrize("number", [True, 3.0, -1])
@pytest.mark.parametrize("cls", [case.cls for case in RUNNING] + [an.QuantizedBatchNorm2d])
def test_num_features_must_be_a_count(cls: Any, number: Any) -> None:
    with pytest.raises(ValueError, match="num_features"):
        cls(number)


@pytest.mark.behaviour(6)
@pytest.mark.parametrize("number", [0, -2])
def test_num_groups_must_be_positive(number: int) -> None:
    with pytest.raises(ValueError, match="num_groups"):
        an.GroupNorm(number, 6)


@pytest.mark.behaviour(6)
@pytest.mark.parametrize("case", [*RUNNING, GROUP_NORM], ids=str)
def test_the_axis_must_be_one_of_the_input(case: Case) -> None:
    ndim = len(case.shape)
    for axis in (ndim, -ndim - 1):
        with pytest.raises(ValueError, match="axis"):
            case.new(axis=axis)(case.x())


@pytest.mark.behaviour(6)
@pytest.mark.parametrize("case", [c for c in FLOATING if c not in FUSED_BATCH_NORMS and c is not RMS_NORM], ids=str)
def test_eps_zero_over_a_zero_variance_gives_the_bias_and_no_gradient(case: Case) -> None:
    layer = case.layer(eps=0.0)
    x = np.full(case.shape, 10000.3, np.float32)
    shape = (1, -1, *[1] * (x.ndim - 2)) if layer.bias.ndim == 1 else layer.bias.shape
    np.testing.assert_array_equal(layer(x), np.broadcast_to(layer.bias.reshape(shape), x.shape))
    np.testing.assert_array_equal(layer.backward(case.x(1)), np.zeros(x.shape))


@pytest.mark.behaviour(6)
@pytest.mark.parametrize("case", BATCH_NORMS, ids=str)
def test_eps_zero_over_a_running_variance_of_zero_gives_the_bias_and_no_gradient(case: Case) -> None:
    layer = case.layer(eps=0.0).eval()
    layer.running_var[...] = 0
    x = case.x()
    np.testing.assert_array_equal(layer(x), np.broadcast_to(layer.bias.reshape(1, -1, *[1] * (x.ndim - 2)), x.shape))
    np.testing.assert_array_equal(layer.backward(case.x(1)), np.zeros(x.shape))


@pytest.mark.behaviour(6)
def test_eps_zero_over_a_zero_mean_square_gives_zero() -> None:
    layer = RMS_NORM.layer(eps=0.0)
    np.testing.assert_array_equal(layer(np.zeros(RMS_NORM.shape, np.float32)), np.zeros(RMS_NORM.shape))
    np.testing.assert_array_equal(layer.backward(RMS_NORM.x()), np.zeros(RMS_NORM.shape))


_RUNNING_TEXT = "(3, eps=1e-05, momentum=0.1, affine={0}, track_running_stats={0})"


@pytest.mark.behaviour(7)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_repr_shows_the_arguments_as_torch_does(case: Case) -> None:
    for flag in (True, False):
        layer = case.new(1e-5, 0.1, flag, flag)
        assert repr(layer) == case.cls.__name__ + _RUNNING_TEXT.format(flag)
    assert "momentum=None" in repr(case.new(1e-5, None))


@pytest.mark.behaviour(7)
@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (an.LayerNorm(5, 1e-5, True), "LayerNorm((5,), eps=1e-05, elementwise_affine=True)"),
        (an.GroupNorm(2, 6, 1e-5, True), "GroupNorm(2, 6, eps=1e-05, affine=True)"),
        (an.RMSNorm((4, 5), None, False), "RMSNorm((4, 5), eps=None, elementwise_affine=False)"),
        (
            an.Sequential(an.GroupNorm(2, 6, 1e-5, True), an.Sequential(an.LayerNorm(5, 1e-5, True))),
            "Sequential(\n"
            "  (0): GroupNorm(2, 6, eps=1e-05, affine=True)\n"
            "  (1): Sequential(\n"
            "    (0): LayerNorm((5,), eps=1e-05, elementwise_affine=True)\n"
            "  )\n"
            ")",
        ),
    ],
    ids=["LayerNorm", "GroupNorm", "RMSNorm", "Sequential"],
)
def test_repr_of_the_other_layers_and_of_a_tree(layer: an.Module, text: str) -> None:
    assert repr(layer) == text


@pytest.mark.behaviour(7)
@pytest.mark.parametrize(
    "cls", [an.QuantizedBatchNorm2d, an.QuantizedBatchNorm3d, an.QuantizedBNReLU2d, an.QuantizedBNReLU3d]
)
def test_repr_of_a_quantized_layer_begins_like_that_of_a_batch_norm(cls: Any) -> None:
    assert repr(cls(3, 1e-5, 0.1)).startswith(f"{cls.__name__}(3, eps=1e-05, momentum=0.1")
