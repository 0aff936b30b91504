"""Section G of the contract, over simulated ranks: threads of this process with a real collective."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed.threads import ThreadCommunicator, ThreadGroup
from layer_cases import BUFFERS, assert_close, draw, held, values
from sync_cases import (
    LAYERS,
    SHAPE,
    TIMEOUT,
    Kind,
    Trained,
    assert_equal_to_one_process,
    on_ranks,
    shards,
    train,
    trained,
)

# Numbers of samples per rank: even, uneven, and more ranks.
CUTS = pytest.mark.parametrize("counts", [(7, 7), (2, 9, 3), (4, 2, 1, 2, 3, 2)], ids=str)


# -- 36: equal to one process ----------------------------------------------------------------------------------


@pytest.mark.behaviour(36)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@CUTS
@LAYERS
def test_ranks_together_give_what_one_process_gives(
    kind: Kind, counts: tuple[int, ...], options: dict[str, Any]
) -> None:
    assert_equal_to_one_process(*train(kind, counts, **options))


@pytest.mark.behaviour(36)
@pytest.mark.parametrize(("shape", "axis"), [((14, 3), 1), ((14, 5, 3), -1), ((14, 3, 2, 1, 2), 1)])
@LAYERS
def test_that_holds_for_any_rank_and_axis(kind: Kind, shape: tuple[int, ...], axis: int) -> None:
    assert_equal_to_one_process(*train(kind, (5, 9), shape=shape, axis=axis))


@pytest.mark.behaviour(36)
@pytest.mark.parametrize("momentum", [0.25, None])
@CUTS
@LAYERS
def test_running_statistics_are_those_of_one_process_and_the_same_on_all_ranks(
    kind: Kind, counts: tuple[int, ...], momentum: float | None
) -> None:
    ranks, single = train(kind, counts, steps=3, momentum=momentum, dtype=np.float64)
    for rank in ranks:
        for name in ("running_mean", "running_var"):
            assert_close(getattr(rank.layer, name), getattr(single.layer, name))
        np.testing.assert_equal(values(rank.layer, *BUFFERS), values(ranks[0].layer, *BUFFERS))
        assert rank.layer.num_batches_tracked == single.layer.num_batches_tracked


@pytest.mark.behaviour(36)
@CUTS
@LAYERS
def test_the_parameters_gradients_of_the_ranks_add_up_to_that_of_one_process(
    kind: Kind, counts: tuple[int, ...]
) -> None:
    ranks, single = train(kind, counts)
    for name in ("weight", "bias"):
        assert_close(sum(rank.layer.grads[name] for rank in ranks), single.layer.grads[name])


@pytest.mark.behaviour(36)
@LAYERS
def test_sub_communicators_are_groups_of_their_own(kind: Kind) -> None:
    groups = [ThreadGroup(2, TIMEOUT), ThreadGroup(2, TIMEOUT)]
    x, dy = draw(*SHAPE, dtype="float64"), draw(*SHAPE, seed=1, dtype="float64")

    def rank(comm: ThreadCommunicator) -> Trained:
        sub = ThreadCommunicator(groups[comm.rank // 2], comm.rank % 2)
        part, d_part = (shards(array, (2, 5, 4, 3))[comm.rank] for array in (x, dy))
        return trained(kind.on(sub), [part], [d_part])

    ranks = on_ranks(4, rank)
    for pair, rows in ((ranks[:2], slice(0, 7)), (ranks[2:], slice(7, 14))):
        assert_equal_to_one_process(pair, trained(kind.alone(), [x[rows]], [dy[rows]]))


# -- 37: ranks with one sample, or none ------------------------------------------------------------------------


@pytest.mark.behaviour(37)
@pytest.mark.parametrize("counts", [(1, 13), (0, 14), (6, 0, 1, 7), (1, 1, 12)], ids=str)
@pytest.mark.parametrize("shape", [(14, 3), SHAPE], ids=str)
@LAYERS
def test_a_rank_with_one_sample_or_none_takes_part(kind: Kind, shape: tuple[int, ...], counts: tuple[int, ...]) -> None:
    x = draw(*shape, dtype="float64")

    def rank(comm: Any) -> tuple[Any, ...]:
        layer = kind.on(comm)
        return layer(shards(x, counts)[comm.rank]), *values(layer, "running_mean", "num_batches_tracked")

    ys, *buffers = zip(*on_ranks(len(counts), rank), strict=True)
    assert [len(y) for y in ys] == list(counts)
    assert_close(np.concatenate(ys), kind.alone()(x))
    for of_ranks in buffers:
        np.testing.assert_array_equal(of_ranks, of_ranks[:1] * len(counts))


@pytest.mark.behaviour(37)
@pytest.mark.parametrize("counts", [(1, 0), (0, 0, 1)], ids=str)
@LAYERS
def test_one_value_over_all_ranks_is_an_error_on_all_ranks(kind: Kind, counts: tuple[int, ...]) -> None:
    x = draw(1, 3)

    def rank(comm: Any) -> None:
        with pytest.raises((ValueError, RuntimeError), match="more than 1 value"):
            kind.on(comm)(shards(x, counts)[comm.rank])

    on_ranks(len(counts), rank)


@pytest.mark.behaviour(37)
@LAYERS
def test_one_value_on_each_of_two_ranks_is_enough(kind: Kind) -> None:
    x = draw(2, 3, dtype="float64")
    ys = on_ranks(2, lambda comm: kind.on(comm)(shards(x, (1, 1))[comm.rank]))
    assert_close(np.concatenate(ys), kind.alone()(x))


@pytest.mark.behaviour(23)
@LAYERS
def test_no_value_on_any_rank_moves_nothing(kind: Kind) -> None:
    def rank(comm: Any) -> Any:
        layer = kind.on(comm)
        before = held(layer)
        assert layer(draw(0, 3)).shape == (0, 3)
        return before == held(layer)

    assert on_ranks(2, rank) == [True, True]


# -- 38: the backward's collective -----------------------------------------------------------------------------


@pytest.mark.behaviour(38)
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)], ids=str)
@LAYERS
def test_a_rank_whose_parameters_need_no_gradient_takes_part(kind: Kind, frozen: tuple[int, ...]) -> None:
    x, dy = draw(*SHAPE, dtype="float64"), draw(*SHAPE, seed=1, dtype="float64")

    def dxs(frozen: tuple[int, ...]) -> list[Any]:
        def rank(comm: Any) -> Any:
            layer = kind.on(comm).requires_grad_(comm.rank not in frozen)
            return trained(layer, *([shards(array, (5, 9))[comm.rank]] for array in (x, dy))).dx

        return on_ranks(2, rank)

    for mine, theirs in zip(dxs(frozen), dxs(()), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.behaviour(38)
@LAYERS
def test_a_rank_without_samples_takes_part(kind: Kind) -> None:
    with_it, _ = train(kind, (0, 5, 9))
    without_it, _ = train(kind, (5, 9))
    assert with_it[0].dx.shape == (0, 3, 5)
    for mine, theirs in zip(with_it[1:], without_it, strict=True):
        assert_close(mine.dx, theirs.dx)


@pytest.mark.behaviour(38)
@LAYERS
def test_a_rank_whose_dy_is_zero_takes_part(kind: Kind) -> None:
    x, dy = draw(*SHAPE, dtype="float64"), draw(*SHAPE, seed=1, dtype="float64")
    dy[:5] = 0

    def rank(comm: Any) -> Trained:
        return trained(kind.on(comm), *([shards(array, (5, 9))[comm.rank]] for array in (x, dy)))

    idle, _ = on_ranks(2, rank)
    assert np.all(idle.dx != 0)  # the other rank's dy moves the mean that is subtracted here


@pytest.mark.behaviour(38)
@LAYERS
def test_without_a_weight_there_is_no_gradient_of_it(kind: Kind) -> None:
    backward_of = {an.BatchNorm: an.batch_norm_backward, an.FusedBatchNorm: an.batch_norm_add_relu_backward}
    x = draw(*SHAPE)

    def rank(comm: Any) -> Any:
        layer = kind.on(comm, affine=False)
        layer(x)
        gradients = backward_of[kind.single](x, layer.kept())
        layer.backward(x)
        return layer.grads, gradients

    for grads, gradients in on_ranks(2, rank):
        assert grads == {"weight": None, "bias": None}
        assert (gradients.dweight, gradients.dbias) == (None, None)


# -- 39: how much is sent --------------------------------------------------------------------------------------


class Recorded(ThreadCommunicator):
    """A rank that writes down what it sends."""

    def __init__(self, comm: ThreadCommunicator) -> None:
        super().__init__(comm._group, comm.rank)
        self.sent: list[str] = []

    def _swap(self, row: Any) -> Any:
        self.sent.append("agreement and payload")
        return super()._swap(row)

    def _gather(self, a: Any) -> Any:
        raise AssertionError("a message of its own")

    _sum = _maximum = _broadcast = _gather


@pytest.mark.behaviour(39)
@pytest.mark.parametrize("number", [2, 3, 16])
@pytest.mark.parametrize("affine", [True, False])
@LAYERS
def test_a_step_is_one_message_each_way_which_carries_the_agreement(kind: Kind, number: int, affine: bool) -> None:
    def rank(comm: ThreadCommunicator) -> list[list[str]]:
        recorded = Recorded(comm)
        layer = kind.on(recorded, affine=affine)
        layer(draw(2, 3, seed=comm.rank))
        forward, recorded.sent = recorded.sent, []
        layer.backward(draw(2, 3, seed=comm.rank))
        return [forward, recorded.sent]

    assert on_ranks(number, rank) == [[["agreement and payload"]] * 2] * number
