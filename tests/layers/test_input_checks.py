"""Section B of the contract: what a layer takes, and the texts of what it refuses."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import (
    BATCH_NORMS,
    BATCH_STATISTICS,
    FLOATING,
    GROUP_NORM,
    INSTANCE_CLASSES,
    INSTANCE_NORMS,
    RUNNING,
    SYNC_BATCH_NORMS,
    Case,
    draw,
    filled,
    held,
)

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
RANKS = {
    an.BatchNorm: ((2, 3, 4, 5, 6), "at least 2D"),
    an.SyncBatchNorm: ((2, 3, 4, 5, 6), "at least 2D"),
    an.FusedBatchNorm: ((2, 3, 4, 5, 6), "at least 2D"),
    an.BatchNorm1d: ((2, 3), "2D or 3D"),
    an.FusedBatchNorm1d: ((2, 3), "2D or 3D"),
    an.BatchNorm2d: ((4,), "4D"),
    an.FusedBatchNorm2d: ((4,), "4D"),
    an.BatchNorm3d: ((5,), "5D"),
    an.FusedBatchNorm3d: ((5,), "5D"),
}
INSTANCE_RANKS = {
    an.InstanceNorm1d: ((2, 3), "2D or 3D"),
    an.InstanceNorm2d: ((3, 4), "3D or 4D"),
    an.InstanceNorm3d: ((4, 5), "4D or 5D"),
}


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def takes_only(layer: Any, ndim: int, accepted: tuple[int, ...], text: str, shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    if ndim in accepted:
        assert layer(x).shape == x.shape
    else:
        with pytest.raises(ValueError, match=exactly(f"expected {text} input (got {ndim}D input)")):
            layer(x)


@pytest.mark.behaviour(8)
@MODES
@pytest.mark.parametrize("ndim", range(7))
@pytest.mark.parametrize("case", BATCH_STATISTICS, ids=str)
def test_a_batch_norm_takes_the_ranks_of_its_name(case: Case, ndim: int, training: bool) -> None:
    accepted, text = RANKS[case.cls]
    takes_only(case.layer().train(training), ndim, accepted, text, (4, 3, 2, 1, 2, 1)[:ndim])


@pytest.mark.behaviour(9)
@MODES
@pytest.mark.parametrize("ndim", range(7))
@pytest.mark.parametrize("cls", INSTANCE_CLASSES)
def test_an_instance_norm_takes_the_rank_of_its_name_with_and_without_the_batch(
    cls: Any, ndim: int, training: bool
) -> None:
    accepted, text = INSTANCE_RANKS[cls]
    shape = (3, 2, 1, 2)[:ndim] if ndim == accepted[0] else (4, 3, 2, 1, 2, 1)[:ndim]
    takes_only(filled(cls(3)).train(training), ndim, accepted, text, shape)


@pytest.mark.behaviour(9)
@MODES
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_an_unbatched_input_is_a_batch_of_one_squeezed_back(case: Case, training: bool) -> None:
    single, batch = case.layer().train(training), case.layer().train(training)
    x, dy = case.x()[0], case.x(1)[0]
    np.testing.assert_array_equal(single(x), batch(x[None])[0])
    np.testing.assert_array_equal(single.backward(dy), batch.backward(dy[None])[0])
    assert held(single) == held(batch)


ONE_VALUE = [(case.cls, (1, 3, *[1] * (len(case.shape) - 2))) for case in BATCH_STATISTICS]


@pytest.mark.behaviour(10)
@MODES
@pytest.mark.parametrize(("cls", "shape"), ONE_VALUE)
def test_one_value_per_channel_has_no_batch_statistics(cls: Any, shape: tuple[int, ...], training: bool) -> None:
    options = {"comm": an.distributed.SELF} if cls is an.SyncBatchNorm else {}
    layer = filled(cls(3, track_running_stats=training, **options)).train(training)
    text = f"Expected more than 1 value per channel when training, got input size {shape}"
    with pytest.raises(ValueError, match=exactly(text)):
        layer(draw(*shape))


@pytest.mark.behaviour(10)
@pytest.mark.parametrize(("cls", "shape"), ONE_VALUE)
def test_one_value_per_channel_is_enough_for_running_statistics(cls: Any, shape: tuple[int, ...]) -> None:
    assert filled(cls(3)).eval()(draw(*shape)).shape == shape


@pytest.mark.behaviour(11)
@pytest.mark.parametrize(("training", "tracking"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_one_spatial_element_has_no_instance_statistics(case: Case, training: bool, tracking: bool) -> None:
    layer = case.layer(track_running_stats=tracking).train(training)
    shape = (4, 3, *[1] * (len(case.shape) - 2))
    for x in (draw(*shape), draw(*shape[1:])):
        with pytest.raises(ValueError, match=r"^Expected more than 1 spatial element when training, got input size"):
            layer(x)


@pytest.mark.behaviour(11)
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_one_spatial_element_is_enough_for_running_statistics(case: Case) -> None:
    shape = (4, 3, *[1] * (len(case.shape) - 2))
    assert case.layer().eval()(draw(*shape)).shape == shape


@pytest.mark.behaviour(12)
def test_the_channels_of_a_group_norm_must_be_divisible_by_the_groups() -> None:
    with pytest.raises(ValueError, match=r"^num_channels must be divisible by num_groups.*6.*4"):
        an.GroupNorm(4, 6)


@pytest.mark.behaviour(12)
@pytest.mark.parametrize("ndim", [0, 1])
def test_a_group_norm_needs_two_dimensions(ndim: int) -> None:
    with pytest.raises(ValueError, match=exactly(f"expected at least 2D input (got {ndim}D input)")):
        an.GroupNorm(2, 6)(draw(*(6,) * ndim))


@pytest.mark.behaviour(12)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("spatial", [(), (1, 1)])
def test_a_group_of_one_value_gives_the_bias_for_every_n(n: int, spatial: tuple[int, ...]) -> None:
    layer = filled(an.GroupNorm(6, 6))
    x = draw(n, 6, *spatial)
    expected = np.broadcast_to(layer.bias.reshape(6, *[1] * len(spatial)), x.shape)
    np.testing.assert_array_equal(layer(x), expected)
    np.testing.assert_array_equal(layer.backward(draw(*x.shape, seed=1)), np.zeros(x.shape))


@pytest.mark.behaviour(13)
@pytest.mark.parametrize("cls", [an.LayerNorm, an.RMSNorm])
def test_an_int_as_normalized_shape_becomes_a_tuple(cls: Any) -> None:
    assert cls(5).normalized_shape == (5,)
    assert cls([4, 5]).normalized_shape == (4, 5)
    assert cls(5)(draw(2, 5)).shape == (2, 5)


@pytest.mark.behaviour(13)
@pytest.mark.parametrize("shape", [(), []])
@pytest.mark.parametrize("cls", [an.LayerNorm, an.RMSNorm])
def test_an_empty_normalized_shape_is_refused(cls: Any, shape: Any) -> None:
    with pytest.raises(ValueError, match="normalized_shape"):
        cls(shape)


@pytest.mark.behaviour(13)
@pytest.mark.parametrize(
    ("normalized", "size", "text"),
    [
        ((4, 5), (2, 5, 4), "normalized_shape=[4, 5], expected input with shape [*, 4, 5], but got input of size"),
        ((4, 5), (5,), "normalized_shape=[4, 5], expected input with shape [*, 4, 5], but got input of size"),
        (5, (5, 4), "normalized_shape=[5], expected input with shape [*, 5], but got input of size"),
        (5, (), "normalized_shape=[5], expected input with shape [*, 5], but got input of size"),
    ],
)
@pytest.mark.parametrize("cls", [an.LayerNorm, an.RMSNorm])
def test_an_input_must_end_with_the_normalized_shape(cls: Any, normalized: Any, size: Any, text: str) -> None:
    with pytest.raises(ValueError, match=exactly(f"Given {text} {size}")):
        cls(normalized)(draw(*size))


@pytest.mark.behaviour(14)
@MODES
@pytest.mark.parametrize("bare", [False, True], ids=["affine and buffers", "bare"])
@pytest.mark.parametrize("case", [*RUNNING, GROUP_NORM], ids=str)
def test_a_wrong_number_of_channels_is_an_error_that_names_both(case: Case, bare: bool, training: bool) -> None:
    options: dict[str, bool] = {} if case is GROUP_NORM else {"track_running_stats": not bare}
    layer = case.layer(affine=not bare, **options).train(training)
    n, channels, *rest = case.shape
    with pytest.raises(ValueError, match=rf"\b{channels}\b.*\b14\b"):
        layer(draw(n, 14, *rest))
    with pytest.raises(ValueError, match=rf"\b{channels}\b.*\b1\b"):  # which would broadcast
        layer(draw(n, 1, *rest))


@pytest.mark.behaviour(14)
@pytest.mark.parametrize("case", [*RUNNING, GROUP_NORM], ids=str)
def test_the_channels_are_counted_on_the_layers_axis(case: Case) -> None:
    layer = case.layer(axis=-1)
    n, channels, *rest = case.shape
    assert layer(draw(n, *rest, channels)).shape == (n, *rest, channels)
    with pytest.raises(ValueError, match=rf"\b{channels}\b.*\b14\b"):
        layer(draw(n, *rest, 14))


@pytest.mark.behaviour(15)
@MODES
@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 2), (4, 0, 2, 2)])
def test_a_synchronized_layer_needs_channels(shape: tuple[int, ...], training: bool) -> None:
    layer = an.SyncBatchNorm(0, comm=an.distributed.SELF).train(training)
    with pytest.raises(ValueError, match=exactly("SyncBatchNorm number of input channels should be non-zero")):
        layer(draw(*shape))


@pytest.mark.behaviour(15)
@pytest.mark.parametrize("case", SYNC_BATCH_NORMS, ids=str)
def test_a_synchronized_layer_takes_arrays_on_the_cpu(case: Case) -> None:
    y = case.layer()(case.x())
    assert type(y) is np.ndarray


@pytest.mark.behaviour(10)
@pytest.mark.parametrize("case", BATCH_NORMS, ids=str)
def test_two_values_per_channel_are_enough(case: Case) -> None:
    shape = (2, 3, *[1] * (len(case.shape) - 2))
    assert case.layer()(draw(*shape)).shape == shape


@pytest.mark.behaviour(8)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_the_input_of_the_right_rank_is_taken(case: Case) -> None:
    y = case.layer()(case.x())
    assert (y.shape, y.dtype) == (case.shape, np.float32)
