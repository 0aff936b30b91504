"""Section G of the contract, behaviour 35: which ranks a synchronized layer shares its statistics with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SELF
from arraynorm.distributed._communicator import LayerNumbers
from arraynorm.distributed.threads import ThreadCommunicator
from layer_cases import assert_close, backward, draw, held
from sync_cases import LAYERS, SHAPE, SYNC, Kind, on_ranks, shards, trained


@pytest.mark.behaviour(35)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@LAYERS
def test_one_rank_is_batch_norm_bit_for_bit(kind: Kind, dtype: str) -> None:
    x, dy = draw(*SHAPE, dtype=dtype), draw(*SHAPE, seed=1, dtype=dtype)
    single = trained(kind.alone(), [x], [dy])
    for rank in (
        trained(kind.on(SELF), [x], [dy]),
        on_ranks(1, lambda comm: trained(kind.on(comm), [x], [dy]))[0],
    ):
        np.testing.assert_array_equal(rank.y, single.y)
        np.testing.assert_array_equal(rank.dx, single.dx)
        assert held(rank.layer) == held(single.layer)


@pytest.mark.behaviour(35)
@LAYERS
def test_self_means_no_synchronization(kind: Kind) -> None:
    x = draw(*SHAPE)
    parts = shards(x, (4, 10))
    ys = on_ranks(2, lambda comm: kind.on(SELF)(parts[comm.rank]))
    for y, part in zip(ys, parts, strict=True):
        np.testing.assert_array_equal(y, kind.alone()(part))


@pytest.mark.behaviour(35)
def test_no_communicator_means_the_world_from_the_first_training_forward_on(monkeypatch: pytest.MonkeyPatch) -> None:
    mine: ContextVar[ThreadCommunicator] = ContextVar("mine")  # each simulated rank's world
    asked: list[list[Any]] = [[], []]

    def world() -> ThreadCommunicator:
        asked[mine.get().rank].append("for the world")
        return mine.get()

    monkeypatch.setattr(an.distributed, "world", world)
    # layers of the world are numbered per process, and here all ranks are one
    monkeypatch.setattr(an.distributed, "layer_numbers", lambda comm: LayerNumbers())
    x = draw(*SHAPE, dtype="float64")

    def rank(comm: ThreadCommunicator) -> list[Any]:
        mine.set(comm)
        shard = shards(x, (4, 10))[comm.rank]
        layers = [SYNC.on(None), an.SyncBatchNorm.convert_sync_batchnorm(SYNC.alone())]
        for layer in layers:
            assert layer.comm is None
            layer.eval()(shard)
        assert asked[comm.rank] == []
        return [layer.train()(shard) for layer in layers]

    results = on_ranks(2, rank)
    expected = shards(SYNC.alone()(x), (4, 10))
    for ys, part in zip(results, expected, strict=True):
        for y in ys:
            assert_close(y, part)
    assert all(asked)


@pytest.fixture
def without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An interpreter that has no mpi4py, and no launcher around it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mpi4py" else find_spec(name, *a))
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    an.distributed.world.cache_clear()
    yield monkeypatch
    an.distributed.world.cache_clear()


# What Open MPI, MPICH (PMI) and Slurm tell the processes that they launch.
LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@pytest.mark.behaviour(35)
@pytest.mark.parametrize("variable", LAUNCHED)
def test_several_ranks_without_mpi4py_cannot_train(without_mpi4py: pytest.MonkeyPatch, variable: str) -> None:
    without_mpi4py.setenv(variable, "2")
    layer = SYNC.on(None)
    with pytest.raises(RuntimeError, match="mpi4py"):
        layer(draw(*SHAPE))
    assert layer.eval()(draw(*SHAPE)).shape == SHAPE


@pytest.mark.behaviour(35)
@pytest.mark.parametrize("variable", [None, *LAUNCHED])
def test_one_process_without_mpi4py_is_its_own_world(without_mpi4py: pytest.MonkeyPatch, variable: str | None) -> None:
    if variable is not None:
        without_mpi4py.setenv(variable, "1")
    x = draw(*SHAPE)
    np.testing.assert_array_equal(SYNC.on(None)(x), SYNC.alone()(x))


class Silent:
    """A communicator that nobody may use."""

    rank, size = 0, 2

    def agree(self, fields: bytes, error: Exception | None = None) -> None:
        raise AssertionError("eval communicated")

    def merge_moments(self, n: int, mean: Any, m2: Any) -> Any:
        raise AssertionError("eval communicated")

    def allreduce_sum(self, a: Any) -> Any:
        raise AssertionError("eval communicated")


@pytest.mark.behaviour(35)
@pytest.mark.parametrize("tracking", [True, False])
@LAYERS
def test_eval_never_communicates(kind: Kind, tracking: bool) -> None:
    layer = kind.on(Silent(), track_running_stats=tracking).eval()
    x, dy = draw(*SHAPE), draw(*SHAPE, seed=1)
    single = trained(kind.alone(track_running_stats=tracking).eval(), [x], [dy])
    np.testing.assert_array_equal(layer(x), single.y)
    np.testing.assert_array_equal(backward(layer, dy), single.dx)
