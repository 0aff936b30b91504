"""What is wrong on one rank is an error on all of them, and none is left waiting."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import MPICommunicator, SyncMismatchError
from arraynorm.distributed import world as our_world

C = 3


@pytest.fixture
def odd(world):
    """Whether this is the rank at fault: the last one."""
    return world.rank == world.size - 1


def refused(world, function, *args):
    """The error that all ranks have raised alike."""
    caught = None
    try:
        function(*args)
    except Exception as error:
        caught = error
    everywhere = set(world.allgather((type(caught).__name__, str(caught))))
    assert len(everywhere) == 1, everywhere
    return caught


def batch(samples=4, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(samples, C, 2)).astype(dtype)


def state(layer):
    return {name: array.tobytes() for name, array in layer.state_dict().items()}


FAULTY_INPUTS = {
    "integers": (lambda x: x.astype(int), "TypeError: SyncBatchNorm: x must have dtype"),
    "a list": (lambda x: x.tolist(), "TypeError: SyncBatchNorm: x must be an array"),
    "a missing channel": (lambda x: x[:, :2], "ValueError: SyncBatchNorm: x must have num_features = 3 channels"),
    "a vector": (lambda x: x[0, 0], "ValueError: expected at least 2D input (got 1D input)"),
    "no channels at all": (lambda x: x[:, :0], "ValueError"),
}


@pytest.mark.parametrize(("spoil", "said"), FAULTY_INPUTS.values(), ids=FAULTY_INPUTS)
def test_an_input_that_one_rank_refuses_is_refused_by_all_and_the_next_call_works(world, odd, spoil, said):
    layer = an.SyncBatchNorm(C)
    before = state(layer)
    error = refused(world, layer, spoil(batch()) if odd else batch())
    assert type(error) is SyncMismatchError
    assert f"rank {world.size - 1}: {said}" in str(error)
    assert state(layer) == before
    layer.backward(layer(batch()))
    assert int(layer.num_batches_tracked) == 1


DIFFERENCES = {
    "dtype": ({}, np.float64, "dtype: float32 on rank 0"),
    "eps": ({"eps": 1e-3}, np.float32, "eps: 1e-05 on rank 0"),
    "momentum": ({"momentum": 0.5}, np.float32, "momentum: 0.1 on rank 0"),
    "weight": ({"affine": False}, np.float32, "weight: 1 on rank 0"),
}


@pytest.mark.parametrize(("settings", "dtype", "said"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_layers_that_differ_raise_on_all_ranks(world, odd, settings, dtype, said):
    layer = an.SyncBatchNorm(C, **(settings if odd else {}))
    before = state(layer)
    error = refused(world, layer, batch(dtype=dtype if odd else np.float32))
    assert type(error) is SyncMismatchError
    assert said in str(error)
    assert f"on rank {world.size - 1}" in str(error)
    assert state(layer) == before


def test_a_wrong_dy_raises_on_all_ranks_and_the_right_one_can_follow(world, odd):
    layer = an.SyncBatchNorm(C)
    y = layer(batch())
    error = refused(world, layer.backward, y[1:] if odd else y)
    assert type(error) is SyncMismatchError
    assert f"rank {world.size - 1}: ValueError: batch_norm_backward: dy must have shape" in str(error)
    assert layer.grads["weight"] is None
    assert layer.backward(y).shape == y.shape


def test_a_missing_cache_raises_on_all_ranks(world, odd):
    layer = an.SyncBatchNorm(C)
    y = layer(batch())
    if odd:
        layer.clear_cache()
    error = refused(world, layer.backward, y)
    assert type(error) is SyncMismatchError
    assert "RuntimeError: SyncBatchNorm: backward needs a forward" in str(error)


@pytest.mark.parametrize("cls", [an.SyncBatchNorm, an.FusedBatchNorm])
def test_one_value_per_channel_over_all_ranks_is_refused_by_all(world, odd, cls):
    layer = cls(C, comm=world)
    before = state(layer)
    error = refused(world, layer, batch()[:odd, :, :1])
    assert type(error) is ValueError
    assert "Expected more than 1 value per channel when training" in str(error)
    assert state(layer) == before


def test_two_values_per_channel_on_two_ranks_are_enough(world):
    layer = an.SyncBatchNorm(C, dtype=np.float64, eps=0)
    y = layer(np.full((int(world.rank < 2), C), 2.0 * world.rank))
    np.testing.assert_array_equal(y, np.full(y.shape, 2.0 * world.rank - 1))  # mean 1, variance 1
    np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * 2, rtol=1e-15)  # unbiased


def test_no_values_at_all_give_empty_results_and_move_nothing(world):
    layer = an.SyncBatchNorm(C)
    before = state(layer)
    y = layer(batch(0))
    assert y.shape == layer.backward(y).shape == (0, C, 2)
    assert state(layer) == before
    for gradient in layer.grads.values():
        np.testing.assert_array_equal(gradient, np.zeros(C, np.float32), strict=True)


def test_functions_refuse_a_raw_communicator_and_name_the_wrapper(world):
    from mpi4py import MPI

    for comm in (world, MPI.COMM_SELF, MPI.COMM_NULL):
        with pytest.raises(TypeError, match=r"wrap .* as arraynorm\.distributed\.MPICommunicator\(comm\)"):
            an.batch_norm(batch(), comm=comm)


def test_what_is_no_group_of_ranks_is_a_type_error(world):
    from mpi4py import MPI

    side = world.Split(world.rank == 0)
    other_leader = 1 if world.rank == 0 else 0
    between = side.Create_intercomm(0, world, other_leader)
    left_out = world.Split(MPI.UNDEFINED)
    for comm in (between, left_out, MPI.COMM_NULL):
        with pytest.raises(TypeError, match="MPICommunicator: comm must be an mpi4py intracommunicator"):
            MPICommunicator(comm)
        with pytest.raises(TypeError, match="comm must be an mpi4py intracommunicator"):
            an.SyncBatchNorm(C, comm=comm)


def test_without_mpi4py_the_launcher_alone_makes_training_raise(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    our_world.cache_clear()
    try:
        error = refused(world, an.SyncBatchNorm(C), batch())
    finally:
        our_world.cache_clear()
    assert type(error) is RuntimeError
    assert f"the launcher started {world.size} ranks" in str(error)
    assert "pip install arraynorm[mpi]" in str(error)
