"""Networks over ranks: converted, trained data-parallel, reverted."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from mpi.shards import LAYOUTS, assert_close, held_alike, shard

C = 4
NORMS = (an.BatchNorm2d, an.FusedBatchNorm2d, an.BatchNorm, an.GroupNorm)


def network():
    """Norms of four kinds, at two depths, in float64, with parameters that are not 1 and 0."""
    net = an.Sequential(
        an.BatchNorm2d(C),
        an.FusedBatchNorm2d(C, momentum=0.3),
        an.Sequential(an.BatchNorm(C, momentum=None, eps=1e-3), an.GroupNorm(2, C)),
    ).double()
    rng = np.random.default_rng(7)
    for parameter in net.parameters():
        parameter[...] = rng.uniform(0.5, 1.5, C)
    return net


def norms(net):
    return [type(module) for module in net.modules() if not isinstance(module, an.Sequential)]


def data(counts, step):
    rng = np.random.default_rng(step)
    return tuple(rng.normal(size=(sum(counts), C, 3, 3)) for _ in "xt")


def train_step(net, x, target, sum_over_ranks):
    """One step of gradient descent on the squared distance, summed over all samples of all ranks."""
    net.zero_grad()
    y = net(x)
    net.backward(y - target)
    for _, parameter, gradient in net.named_gradients():
        parameter -= 1e-3 * sum_over_ranks(gradient)
    return y


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_data_parallel_training_is_training_on_the_whole_batch(world, layout):
    counts = layout(world.size)
    whole, net = network(), an.SyncBatchNorm.convert_sync_batchnorm(network())
    for step in range(4):
        x, target = data(counts, step)
        expected = train_step(whole, x, target, lambda gradient: gradient)
        y = train_step(net, *(shard(a, counts, world.rank) for a in (x, target)), world.allreduce)
        # Twelve norms in a row each pass on the rounding of the last: ten times that of one.
        assert_close(y, shard(expected, counts, world.rank), 1e-11)
    for name, array in whole.state_dict().items():
        assert_close(net.state_dict()[name], array, 1e-11)
    assert held_alike(world, *net.state_dict().values())


def test_a_converted_network_shares_with_the_ranks_it_was_given(world):
    group = world.Split(world.rank % 2)
    net = an.SyncBatchNorm.convert_sync_batchnorm(network(), group)
    counts = LAYOUTS["uneven"](group.size)
    x, _ = data(counts, step=world.rank % 2)
    assert_close(net(shard(x, counts, group.rank)), shard(network()(x), counts, group.rank), 1e-11)


def test_converting_again_changes_the_ranks(world):
    from mpi4py import MPI

    net = an.SyncBatchNorm.convert_sync_batchnorm(network(), MPI.COMM_SELF)
    an.SyncBatchNorm.convert_sync_batchnorm(net, world)
    counts = LAYOUTS["last rank empty"](world.size)
    x, _ = data(counts, step=0)
    assert_close(net(shard(x, counts, world.rank)), shard(network()(x), counts, world.rank), 1e-11)


def test_reverting_gives_the_classes_back_and_stops_all_communication(world):
    net = an.SyncBatchNorm.convert_sync_batchnorm(network())
    assert norms(net) == [an.SyncBatchNorm, an.FusedBatchNorm2d, an.SyncBatchNorm, an.GroupNorm]
    x, target = data([5], step=world.rank)
    train_step(net, x, target, world.allreduce)
    net = an.revert_sync_batchnorm(net)
    assert norms(net) == list(NORMS)
    for _ in range(1 + world.rank):  # every rank at its own pace
        train_step(net, x, target, lambda gradient: gradient)
    world.Barrier()


def test_conversion_keeps_the_running_statistics_that_the_ranks_have_gathered(world):
    net = an.SyncBatchNorm.convert_sync_batchnorm(network())
    x, target = data([5], step=world.rank)
    train_step(net, x, target, world.allreduce)
    before = {name: array.tobytes() for name, array in net.state_dict().items()}
    for convert in (an.revert_sync_batchnorm, an.SyncBatchNorm.convert_sync_batchnorm):
        net = convert(net)
        assert {name: array.tobytes() for name, array in net.state_dict().items()} == before
