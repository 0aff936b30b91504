"""Section E of the contract: state_dict and its migrations, pickle, deepcopy."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import array_api_strict
import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed.threads import ThreadCommunicator, ThreadGroup
from layer_cases import (
    BATCH_NORMS,
    BUFFERS,
    COUNTED,
    FILLED,
    FLOATING,
    INSTANCE_NORMS,
    RMS_NORM,
    RUNNING,
    Case,
    filled,
    held,
)


def tree() -> Any:
    return filled(an.Sequential(an.BatchNorm2d(3), an.Sequential(an.GroupNorm(1, 3), an.BatchNorm2d(3, affine=False))))


TREE_KEYS = [f"0.{name}" for name in FILLED] + ["1.0.weight", "1.0.bias"] + [f"1.1.{name}" for name in BUFFERS]


def saved_by_torch(layer: Any, version: int | None = 2) -> OrderedDict[str, Any]:
    """What torch.save writes of such a layer, with NumPy arrays for tensors; its layout version stands beside."""
    state = OrderedDict((name, np.array(array)) for name, array in layer.state_dict().items())
    state._metadata = OrderedDict({"": {} if version is None else {"version": version}})  # type: ignore[attr-defined]
    return state


# -- 28 --------------------------------------------------------------------------------------------------------


@pytest.mark.behaviour(28)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_keys_stand_in_torchs_order_and_those_of_none_are_absent(case: Case) -> None:
    assert tuple(case.layer().state_dict()) == FILLED
    assert tuple(case.layer(affine=False).state_dict()) == BUFFERS
    assert tuple(case.layer(track_running_stats=False).state_dict()) == ("weight", "bias")
    assert tuple(case.layer(bias=False, track_running_stats=False).state_dict()) == ("weight",)


@pytest.mark.behaviour(28)
def test_keys_of_nested_modules_carry_their_path() -> None:
    model = tree()
    state = model.state_dict()
    assert list(state) == TREE_KEYS
    assert list(model.state_dict(prefix="net.")) == [f"net.{key}" for key in TREE_KEYS]
    assert state["1.1.running_var"] is model[1][1].running_var


@pytest.mark.behaviour(28)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_loading_copies_into_the_arrays_that_are_there(case: Case) -> None:
    layer, source = case.layer(), filled(case.layer(), seed=9)
    arrays = dict(layer.state_dict())
    state = saved_by_torch(source)
    given = dict(state)
    layer.load_state_dict(state)
    assert held(layer) == held(source)
    for name, array in arrays.items():
        assert getattr(layer, name) is array
        assert not np.shares_memory(array, given[name])
    assert list(state.items()) == list(given.items())
    assert held(source) == held(filled(case.layer(), seed=9))


@pytest.mark.behaviour(28)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_loading_an_old_state_leaves_the_callers_dict_as_it_was(case: Case) -> None:
    state = saved_by_torch(case.layer(), version=None)
    del state["num_batches_tracked"]
    given = dict(state)
    case.layer().load_state_dict(state, strict=False)
    assert list(state.items()) == list(given.items())


@pytest.mark.behaviour(28)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_loading_copies_between_dtypes_and_libraries(case: Case) -> None:
    layer, source = case.layer(), filled(case.layer(dtype=np.float64), seed=9)
    state = OrderedDict((name, array_api_strict.asarray(array)) for name, array in source.state_dict().items())
    state._metadata = source.state_dict()._metadata  # type: ignore[attr-defined]
    layer.load_state_dict(state)
    assert held(layer) == held(source.float())


# -- 29, 30 ----------------------------------------------------------------------------------------------------


@pytest.mark.behaviour(29)
@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_a_counter_missing_from_an_old_state_is_filled_in_as_zero(case: Case, version: int | None) -> None:
    layer = case.layer()
    state = saved_by_torch(layer, version)
    del state["num_batches_tracked"]
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0


@pytest.mark.behaviour(29)
def test_a_plain_dict_is_an_old_state() -> None:
    model = tree()
    state = {key: array for key, array in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    model.load_state_dict(state)
    assert (model[0].num_batches_tracked, model[1][1].num_batches_tracked) == (0, 0)


@pytest.mark.behaviour(29)
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_a_counter_missing_from_a_new_state_is_an_error(case: Case, version: int) -> None:
    layer = case.layer()
    state = saved_by_torch(layer, version)
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "num_batches_tracked"'):
        layer.load_state_dict(state)
    assert layer.num_batches_tracked == COUNTED


@pytest.mark.behaviour(29)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_the_state_carries_version_two(case: Case) -> None:
    assert case.layer().state_dict()._metadata == {"": {"version": 2}}


@pytest.mark.behaviour(29)
def test_the_state_of_a_tree_carries_a_version_for_each_path() -> None:
    versions = {path: entry["version"] for path, entry in tree().state_dict()._metadata.items()}
    assert versions == {"": 1, "0": 2, "1": 1, "1.0": 1, "1.1": 2}


@pytest.mark.behaviour(30)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_an_old_state_with_statistics_that_an_instance_norm_does_not_track_is_refused(case: Case, strict: bool) -> None:
    layer = case.layer(track_running_stats=False)
    state = dict(filled(case.layer(), seed=9).state_dict())
    del state["num_batches_tracked"]
    name = case.cls.__name__
    text = (
        f'Unexpected running stats buffer(s) "running_mean" and "running_var" for {name} with '
        "track_running_stats=False. If state_dict is a checkpoint saved before 0.4.0, this may be expected because "
        f"{name} does not track running stats by default since 0.4.0."
    )
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(state, strict=strict)
    assert text in str(error.value)


@pytest.mark.behaviour(30)
def test_that_refusal_names_the_buffers_by_their_paths() -> None:
    model = an.Sequential(an.InstanceNorm1d(3, track_running_stats=False))
    with pytest.raises(RuntimeError, match=r'buffer\(s\) "0\.running_var" for InstanceNorm1d with'):
        model.load_state_dict({"0.running_var": np.ones(3, np.float32)}, strict=False)


@pytest.mark.behaviour(30)
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_a_new_state_with_statistics_that_are_not_tracked_has_unexpected_keys(case: Case) -> None:
    layer = case.layer(affine=False, track_running_stats=False)
    state = saved_by_torch(case.layer(affine=False))
    assert layer.load_state_dict(state, strict=False).unexpected_keys == list(BUFFERS)


@pytest.mark.behaviour(30)
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_an_instance_norm_that_tracks_loads_an_old_state(case: Case) -> None:
    layer, source = case.layer(), filled(case.layer(), seed=9)
    layer.load_state_dict(dict(source.state_dict()))
    np.testing.assert_array_equal(layer.running_var, source.running_var)


# -- 31 --------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Any] = {
    r'Missing key\(s\) in state_dict: "0\.running_mean"': lambda state: state.pop("0.running_mean"),
    r'Unexpected key\(s\) in state_dict: "extra", "1\.0\.more"': lambda state: state.update(
        {"extra": np.ones(3), "1.0.more": np.ones(3)}
    ),
    r"size mismatch for 1\.0\.weight: copying a param with shape \(4,\).*in current model is \(3,\)": lambda state: (
        state.update({"1.0.weight": np.ones(4, np.float32)})
    ),
    r"size mismatch for 1\.1\.running_var: .*\(1, 3\).*\(3,\)": lambda state: state.update(
        {"1.1.running_var": np.ones((1, 3), np.float32)}
    ),
}


@pytest.mark.behaviour(31)
@pytest.mark.parametrize("texts", [[text] for text in FAULTS] + [list(FAULTS)], ids=["0", "1", "2", "3", "all"])
def test_all_faults_of_a_load_stand_in_one_error_and_nothing_is_loaded(texts: list[str]) -> None:
    model, state = tree(), filled(tree(), seed=9).state_dict()
    for text in texts:
        FAULTS[text](state)
    before = held(model)
    with pytest.raises(RuntimeError, match=texts[0]) as error:
        model.load_state_dict(state)
    for text in texts:
        error.match(text)
    assert held(model) == before


@pytest.mark.behaviour(31)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_a_state_saved_by_torch_loads_by_key(case: Case) -> None:
    layer, source = case.layer(), filled(case.layer(), seed=9)
    result = layer.load_state_dict(OrderedDict(reversed(saved_by_torch(source).items())))
    assert held(layer) == held(source)
    assert result == ([], [])


@pytest.mark.behaviour(31)
@pytest.mark.parametrize("case", [case for case in FLOATING if case is not RMS_NORM], ids=str)
def test_our_state_has_the_names_shapes_and_dtypes_that_torch_loads(case: Case) -> None:
    state = case.layer().state_dict()
    for name, array in state.items():
        assert type(array) is np.ndarray
        if name == "num_batches_tracked":
            assert (array.shape, array.dtype.kind) == ((), "i")
        else:
            assert array.dtype == np.float32
    assert set(state) <= set(FILLED)


# -- 32 --------------------------------------------------------------------------------------------------------


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def double_the_output(module: Any, args: Any, y: Any) -> Any:
    return 2 * y


COPIES = pytest.mark.parametrize("copied", [pickled, copy.deepcopy])


@pytest.mark.behaviour(32)
@COPIES
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_a_copy_keeps_everything_but_the_cache(case: Case, copied: Any) -> None:
    layer = case.layer()
    layer(case.x())
    layer.backward(case.x(1))  # leaves gradients
    layer.register_forward_hook(double_the_output)
    layer.eval()
    layer.note = "kept"
    layer(case.x())  # leaves a cache
    new = copied(layer)
    assert held(new) == held(layer)
    assert (repr(new), new.training, new.note) == (repr(layer), False, "kept")
    np.testing.assert_array_equal(new(case.x()), layer(case.x()))
    new = copied(layer)
    with pytest.raises(RuntimeError, match="backward"):
        new.backward(case.x(1))
    layer.backward(case.x(1))  # the original has kept its cache


@pytest.mark.behaviour(32)
@COPIES
def test_a_copy_has_arrays_of_its_own(copied: Any) -> None:
    model = tree()
    before, new = held(model), copied(model)
    for array in (*new.parameters(), *new.buffers()):
        array[...] = 7
    assert held(model) == before


def another_rank() -> ThreadCommunicator:
    """A rank of a group of two whose peer never comes."""
    return ThreadCommunicator(ThreadGroup(2, timeout=0.1), 0)


SYNCHRONIZED = [an.SyncBatchNorm, an.FusedBatchNorm1d]


@pytest.mark.behaviour(32)
@pytest.mark.parametrize("cls", SYNCHRONIZED)
def test_a_deepcopy_keeps_the_communicator_by_reference(cls: Any) -> None:
    comm = another_rank()
    model = an.Sequential(cls(3, comm=comm), cls(3, comm=comm))
    assert [layer.comm for layer in copy.deepcopy(model)] == [comm, comm]


@pytest.mark.behaviour(32)
@pytest.mark.parametrize("cls", SYNCHRONIZED)
def test_an_unpickled_layer_trains_only_after_its_communicator_is_set(cls: Any) -> None:
    layer = filled(cls(3, comm=another_rank()))
    new = pickled(layer)
    x = np.ones((4, 3), np.float32)
    with pytest.raises(RuntimeError, match="comm"):
        new(x)
    assert new.eval()(x).shape == x.shape
    new.comm = an.distributed.SELF
    assert new.train()(x).shape == x.shape


@pytest.mark.behaviour(32)
@pytest.mark.parametrize("comm", [None, an.distributed.SELF], ids=["world", "SELF"])
@pytest.mark.parametrize("cls", SYNCHRONIZED)
def test_the_world_and_self_survive_pickling(cls: Any, comm: Any) -> None:
    layer = cls(3, comm=comm)
    assert pickled(layer).comm is layer.comm


@pytest.mark.behaviour(32)
@COPIES
def test_a_shared_layer_stays_shared(copied: Any) -> None:
    layer = BATCH_NORMS[0].layer()
    new = copied(an.Sequential(layer, layer))
    assert new[0] is new[1]
