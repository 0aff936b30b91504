"""Section F of the contract: convert_sync_batchnorm and revert_sync_batchnorm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed.threads import ThreadCommunicator, ThreadGroup
from layer_cases import (
    BATCH_NORMS,
    BATCH_STATISTICS,
    FILLED,
    FUSED_BATCH_NORMS,
    SYNC_BATCH_NORMS,
    Case,
    filled,
)

convert, revert = an.SyncBatchNorm.convert_sync_batchnorm, an.revert_sync_batchnorm
PLAIN = BATCH_NORMS + SYNC_BATCH_NORMS


def ranks() -> ThreadCommunicator:
    """A communicator of two ranks, which nobody talks to here."""
    return ThreadCommunicator(ThreadGroup(2, timeout=0.1), 0)


class Block(an.Module):
    """A container of another kind than Sequential, which takes part in no forward here."""

    def __init__(self) -> None:
        super().__init__()
        self.first = an.BatchNorm1d(3)
        self.inner = an.Sequential(an.GroupNorm(1, 3), an.BatchNorm3d(3))
        self.last = an.FusedBatchNorm2d(3)


@pytest.mark.behaviour(33)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_batch_norm_given_directly_becomes_a_new_layer(case: Case) -> None:
    layer, comm = case.layer(), ranks()
    before = dict(layer.__dict__)
    new = convert(layer, comm)
    assert type(new) is an.SyncBatchNorm
    assert new is not layer
    assert new.comm is comm
    assert layer.__dict__ == before
    assert type(layer) is case.cls


@pytest.mark.behaviour(33)
def test_a_container_returns_itself_with_its_children_replaced_at_any_depth() -> None:
    block, comm = filled(Block()), ranks()
    inner, group, fused = block.inner, block.inner[0], block.last
    names = [name for name, _ in block.named_modules()]
    keys = list(block.state_dict())
    assert convert(block, comm) is block
    assert [name for name, _ in block.named_modules()] == names
    assert list(block.state_dict()) == keys
    assert (block.inner, block.inner[0], block.last) == (inner, group, fused)  # untouched, but for a communicator
    assert [type(layer) for layer in (block.first, block.inner[1])] == [an.SyncBatchNorm] * 2
    assert [layer.comm for layer in (block.first, block.inner[1], block.last)] == [comm] * 3


@pytest.mark.behaviour(33)
@pytest.mark.parametrize("layer", [an.InstanceNorm1d(3), an.GroupNorm(1, 3), an.LayerNorm(3), an.RMSNorm(3)])
def test_other_layers_are_untouched(layer: Any) -> None:
    before = dict(layer.__dict__)
    assert convert(layer, ranks()) is layer
    assert revert(layer) is layer
    assert layer.__dict__ == before


@pytest.mark.behaviour(33)
@pytest.mark.parametrize("case", FUSED_BATCH_NORMS, ids=str)
def test_a_fused_batch_norm_gets_the_communicator_and_gives_it_back(case: Case) -> None:
    layer, comm = case.layer(), ranks()
    assert layer.comm is an.distributed.SELF
    assert convert(layer, comm) is layer
    assert layer.comm is comm
    assert revert(layer) is layer
    assert layer.comm is an.distributed.SELF
    assert type(layer) is case.cls


@pytest.mark.behaviour(33)
def test_a_synchronized_layer_is_created_again_so_that_its_communicator_can_change() -> None:
    first, second = ranks(), ranks()
    layer = an.SyncBatchNorm(3, comm=first)
    model = an.Sequential(layer)
    convert(model, second)
    assert model[0] is not layer
    assert model[0].comm is second
    assert layer.comm is first


@pytest.mark.behaviour(33)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("case", BATCH_NORMS, ids=str)
def test_revert_gives_back_the_class_that_a_layer_came_from(case: Case, times: int) -> None:
    layer = model = an.Sequential(case.layer())
    for _ in range(times):
        convert(model, ranks())
    assert revert(model) is layer
    assert type(model[0]) is case.cls
    np.testing.assert_array_equal(model(case.x()), case.layer()(case.x()))
    model.backward(case.x(1))


@pytest.mark.behaviour(33)
def test_revert_makes_a_layer_that_was_built_synchronized_the_batch_norm_of_any_rank() -> None:
    assert type(revert(an.SyncBatchNorm(3))) is an.BatchNorm
    assert type(revert(convert(an.SyncBatchNorm(3)))) is an.BatchNorm


@pytest.mark.behaviour(33)
def test_convert_is_a_class_method() -> None:
    class Mine(an.SyncBatchNorm):
        """A user's own."""

    assert type(Mine.convert_sync_batchnorm(an.BatchNorm2d(3), ranks())) is Mine


@pytest.mark.behaviour(33)
def test_a_layer_that_stands_in_two_places_stays_one() -> None:
    layer = an.BatchNorm1d(3)
    model = convert(an.Sequential(layer, an.Sequential(layer)), ranks())
    assert type(model[0]) is an.SyncBatchNorm
    assert model[1][0] is model[0]


CONVERTED = pytest.mark.parametrize("case", BATCH_STATISTICS, ids=str)


@pytest.mark.behaviour(34)
@CONVERTED
def test_settings_are_carried(case: Case) -> None:
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats", "axis")
    layer = case.new(0.25, 0.75, False, False, axis=2)
    expected = [getattr(layer, name) for name in names]
    assert expected == [3, 0.25, 0.75, False, False, 2]
    for new in (convert(layer, ranks()), revert(convert(layer, ranks()))):
        assert [getattr(new, name) for name in names] == expected


@pytest.mark.behaviour(34)
@CONVERTED
def test_the_state_goes_through_the_conversion_in_the_same_arrays(case: Case) -> None:
    layer = case.layer()
    for new in (convert(layer, ranks()), revert(convert(layer, ranks()))):
        assert all(getattr(new, name) is getattr(layer, name) for name in FILLED)


@pytest.mark.behaviour(34)
@CONVERTED
def test_absent_parameters_and_buffers_stay_absent(case: Case) -> None:
    new = convert(case.layer(affine=False, track_running_stats=False), ranks())
    assert [getattr(new, name) for name in FILLED] == [None] * 5


@pytest.mark.behaviour(34)
@pytest.mark.parametrize("training", [True, False])
@CONVERTED
def test_training_hooks_gradients_and_qconfig_are_kept(case: Case, training: bool) -> None:
    layer, seen = case.layer(), []
    layer(case.x())
    layer.backward(case.x(1))
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, y: seen.append("after"))
    layer.qconfig = "int8"
    layer.train(training)
    grads = dict(layer.grads)
    for new in (convert(layer, an.distributed.SELF), revert(convert(layer, ranks()))):
        assert new.training is training
        assert new.qconfig == "int8"
        assert all(new.grads[name] is gradient for name, gradient in grads.items())
        seen.clear()
        new(case.x())
        assert seen == ["before", "after"]


@pytest.mark.behaviour(34)
@CONVERTED
def test_a_layer_without_qconfig_gets_none(case: Case) -> None:
    assert not hasattr(convert(case.layer(), ranks()), "qconfig")
