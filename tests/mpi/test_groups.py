"""Which ranks share: sub-communicators, copies and pickles of layers, and what stays silent."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SELF, MPICommunicator, SyncMismatchError
from mpi.shards import assert_close, held_alike, shard

C = 4
EXACT = 1e-12  # float64 on well-conditioned data, where only the order of some sums differs


def batch(counts, seed=0):
    return np.random.default_rng(seed).normal(3.0, 2.0, (sum(counts), C, 3))


def assert_shares(layer, group, seed=0):
    """A training step of `layer` is one of the whole `group`, and of no other rank."""
    counts = [2 + 3 * rank for rank in range(group.size)]
    x = batch(counts, seed)
    whole = an.BatchNorm(C, dtype=np.float64, eps=layer.eps)
    for name, array in layer.state_dict().items():
        getattr(whole, name)[...] = array
    y, dx = whole(x), whole.backward(x * x)  # not x: its gradient is zero but for eps
    assert_close(layer(shard(x, counts, group.rank)), shard(y, counts, group.rank), EXACT)
    assert_close(layer.backward(shard(x * x, counts, group.rank)), shard(dx, counts, group.rank), EXACT)


def test_sub_communicators_are_independent_groups(world):
    color = world.rank % 2
    group = world.Split(color)
    layer = an.SyncBatchNorm(C, comm=group, dtype=np.float64, eps=(1e-5, 1e-2)[color])
    for step in range(1 + color):  # each group at its own pace, with its own settings
        assert_shares(layer, group, seed=10 * color + step)
    assert held_alike(group, layer.running_mean, layer.running_var)
    means = world.allgather(layer.running_mean.tobytes())
    assert len(set(means)) == min(world.size, 2)


def test_a_rank_may_be_in_two_groups(world):
    pair = world.Split(world.rank // 2)
    assert_shares(an.SyncBatchNorm(C, comm=pair, dtype=np.float64), pair)
    assert_shares(an.SyncBatchNorm(C, comm=world, dtype=np.float64), world)
    assert_shares(an.SyncBatchNorm(C, comm=pair, dtype=np.float64), pair)


def test_a_group_numbers_its_ranks_itself(world):
    reverse = world.Split(0, -world.rank)
    assert MPICommunicator(reverse).rank == world.size - 1 - world.rank
    assert_shares(an.SyncBatchNorm(C, comm=reverse, dtype=np.float64), reverse)


def test_a_communicator_with_a_topology_is_one(world):
    ring = world.Create_cart([world.size], periods=[True])
    assert_shares(an.SyncBatchNorm(C, comm=ring, dtype=np.float64), ring)


def test_a_group_of_one_rank_is_batch_norm_bit_for_bit(world):
    from mpi4py import MPI

    x = batch([5 + world.rank]).astype(np.float32)
    for comm in (MPI.COMM_SELF, world.Split(world.rank), SELF):
        layer, alone = an.SyncBatchNorm(C, comm=comm), an.BatchNorm(C)
        assert layer(x).tobytes() == alone(x).tobytes()
        assert layer.backward(x).tobytes() == alone.backward(x).tobytes()
        assert layer.running_var.tobytes() == alone.running_var.tobytes()


def test_our_communicator_says_who_it_is(world):
    comm = MPICommunicator(world)
    assert (comm.rank, comm.size) == (world.rank, world.size)
    assert repr(comm) == f"MPICommunicator(rank {world.rank} of {world.size})"


def test_wrapping_a_communicator_thousands_of_times_costs_one_duplicate(world):
    for _ in range(2500):  # MPICH runs out of communicators at 2046
        MPICommunicator(world)
    assert_shares(an.SyncBatchNorm(C, comm=world, dtype=np.float64), world)


def test_messages_of_the_caller_on_the_same_communicator_do_not_meet_ours(world):
    # One collective of the caller's is begun before ours on rank 0 and after them on the others: an error within
    # one communicator, none between two.
    layer = an.SyncBatchNorm(C, comm=world, dtype=np.float64)
    one, total = np.ones(1), np.zeros(1)
    begun = world.Iallreduce(one, total) if world.rank == 0 else None
    assert_shares(layer, world)
    (begun or world.Iallreduce(one, total)).Wait()
    assert total[0] == world.size


# -- silence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("cls", [an.SyncBatchNorm, an.FusedBatchNorm])
def test_in_eval_one_rank_may_call_alone(world, cls, tracking):
    layer = cls(C, comm=world, track_running_stats=tracking)
    layer(batch([4 + world.rank]))
    layer.eval()
    for _ in range(1 + world.rank):  # ranks call as often as they like
        y = layer(batch([3]))
        layer.backward(y)
    world.Barrier()


def test_a_layer_without_communicator_is_silent_in_training(world):
    layer = an.FusedBatchNorm(C)
    for _ in range(1 + world.rank):
        layer.backward(layer(batch([3])))
    world.Barrier()


# -- copies ----------------------------------------------------------------------------------------------------


def test_a_deepcopy_shares_with_the_same_ranks(world):
    group = world.Split(world.rank % 2)
    net = an.Sequential(an.SyncBatchNorm(C, comm=group, dtype=np.float64))
    copied = copy.deepcopy(net)
    assert copied[0].comm is net[0].comm
    assert_shares(copied[0], group)
    np.testing.assert_array_equal(net[0].running_mean, 0.0)  # the copy's arrays are its own


def test_an_unpickled_layer_has_lost_its_communicator_until_it_is_set(world):
    layer = pickle.loads(pickle.dumps(an.SyncBatchNorm(C, comm=world, dtype=np.float64)))
    with pytest.raises(RuntimeError, match=r"the communicator was lost .* set layer\.comm"):
        layer(batch([4]))
    assert int(layer.num_batches_tracked) == 0
    layer.eval()(batch([4]))
    layer.train().comm = world
    assert_shares(layer, world)


def test_a_layer_of_the_whole_world_survives_the_journey_to_other_ranks(world):
    made = None
    if world.rank == 0:
        made = an.SyncBatchNorm(C, dtype=np.float64)
        made.running_mean[...] = 7.0
    layer = world.bcast(made)
    np.testing.assert_array_equal(layer.running_mean, 7.0)
    assert_shares(layer, world)


def test_self_survives_pickling(world):
    layer = pickle.loads(pickle.dumps(an.SyncBatchNorm(C, comm=SELF)))
    assert layer.comm is SELF
    for _ in range(1 + world.rank):
        layer(batch([4]))


def test_a_communicator_itself_cannot_be_pickled(world):
    with pytest.raises(TypeError, match="MPICommunicator: a communicator cannot be pickled"):
        pickle.dumps(MPICommunicator(world))


def test_duplicates_are_freed_with_what_they_were_made_of(world):
    from mpi4py import MPI

    # MPICH has some 2000 communicators in a process; to make so many with all ranks would take minutes.
    for comm, times in ((MPI.COMM_SELF, 2500), (world, 10)):
        for _ in range(times):
            side = comm.Dup()
            MPICommunicator(side)
            side.Free()


def test_summing_over_the_ranks_gives_what_gathering_gives(world):
    # What many ranks do, forced on few: a mean of 1e4, a deviation of 1e-2, and a rank without samples.
    shard = 1e4 + 1e-2 * np.random.default_rng(world.rank).standard_normal((40 * (world.rank > 0), C))
    results = []
    for limit in (1, 1024):
        comm = MPICommunicator(world.Dup(), max_gathered_ranks=limit)
        _, cache = an.batch_norm_forward(shard, comm=comm)
        results.append((cache.mean, cache.var))
        assert len(set(world.allgather(cache.mean.tobytes() + cache.var.tobytes()))) == 1
    (mean, var), (gathered_mean, gathered_var) = results
    np.testing.assert_allclose(mean, gathered_mean, rtol=1e-15)
    np.testing.assert_allclose(var, gathered_var, rtol=1e-10)


def test_there_is_one_communicator_over_another_and_its_settings_stay(world):
    raw = world.Dup()
    comm = MPICommunicator(raw, timeout=60)
    assert MPICommunicator(raw) is MPICommunicator(raw, timeout=60.0) is comm
    with pytest.raises(ValueError, match=r"timeout must be that of the communicator over comm that there is, 60\.0"):
        MPICommunicator(raw, timeout=61)
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got 0"):
        MPICommunicator(world.Dup(), timeout=0)


def test_settings_that_differ_between_ranks_raise_on_all(world):
    raw = world.Dup()
    with pytest.raises(SyncMismatchError, match=r"timeout: 60 on rank 0, 61 on rank 1"):
        MPICommunicator(raw, timeout=60 + world.rank)
    with pytest.raises(SyncMismatchError, match=r"cuda_aware: 0 on rank 0, 1 on rank 1"):
        MPICommunicator(raw, cuda_aware=world.rank > 0)
