"""However a batch falls on the ranks, and by either way of merging, the result is that of the whole batch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import MPICommunicator
from mpi.shards import assert_close, assert_neighbours, held_alike, shard

C = 3
SPLITS = 5
SHAPES = {"1d": (), "1d with length": (4,), "2d": (3, 2), "3d": (2, 1, 3)}
EXACT = 1e-12  # float64 on well-conditioned data, where the two differ in the order of some sums


@pytest.fixture(params=["gathered", "summed"])
def comm(request, world):
    """A communicator that gathers statistics, and one that sums them, as it is done on many ranks."""
    raw = world.Dup()
    yield MPICommunicator(raw, max_gathered_ranks=16 if request.param == "gathered" else 1)
    raw.Free()


def splits(ranks, seed):
    """Samples on each rank, the same draw on all of them: about a third have none, a third have one."""
    rng = np.random.default_rng(seed)
    for _ in range(SPLITS):
        counts = rng.choice([0, 1, 6], ranks) * rng.integers(1, 3, ranks)
        counts[rng.integers(ranks)] += 2  # for two values per channel, where there is no axis but N
        yield counts


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_a_layer_is_batch_norm_on_the_concatenated_batch_however_it_is_split(comm, world, shape, dtype):
    # In narrow dtypes both round float64 results once, and those differ by some 1e-15.
    same = (lambda a, b: assert_close(a, b, EXACT)) if dtype == np.float64 else assert_neighbours
    parameters = np.float64 if dtype == np.float64 else np.float32
    sync, whole = an.SyncBatchNorm(C, comm=comm, dtype=parameters), an.BatchNorm(C, dtype=parameters)
    for seed, counts in enumerate(splits(world.size, seed=len(shape))):
        sync.zero_grad(), whole.zero_grad()
        rng = np.random.default_rng(seed)
        x, dy = (rng.normal(mean, 2.0, (counts.sum(), C, *shape)).astype(dtype) for mean in (3.0, 0.0))
        for layer in (sync, whole):
            layer.weight[...], layer.bias[...] = (0.5, 1.0, -2.0), (0.0, 1.0, 3.0)
        same(sync(shard(x, counts, world.rank)), shard(whole(x), counts, world.rank))
        same(sync.backward(shard(dy, counts, world.rank)), shard(whole.backward(dy), counts, world.rank))
        for name, gradient in whole.grads.items():
            mine = sync.grads[name].astype(np.float64)
            # every rank's sum is rounded to float32, and so is that for the whole batch
            bound = EXACT if dtype == np.float64 else np.finfo(np.float32).eps * world.size
            scale = np.max(world.allreduce(np.abs(mine)))
            assert np.all(np.abs(world.allreduce(mine) - gradient) <= bound * scale)
    for name in ("running_mean", "running_var"):
        same(getattr(sync, name), getattr(whole, name))
    assert int(sync.num_batches_tracked) == SPLITS
    assert held_alike(world, *sync.state_dict().values())


def hard_parts(ranks):
    """37, 200, 5 and 0 samples in turn: a deviation of 1e-2 around 1e4, and around another mean on each rank."""
    rng = np.random.default_rng(1)
    counts = [(37, 200, 5, 0)[rank % 4] for rank in range(ranks)]
    means = [(1e4, 1e4 + 1e-2 * rank) for rank in range(ranks)]
    return [rng.normal(mean, 1e-2, (n, 2)).astype(np.float32) for n, mean in zip(counts, means, strict=True)]


def test_hard_data_keeps_ten_digits_of_the_variance(comm, world):
    parts = hard_parts(world.size)
    _, cache = an.batch_norm_forward(parts[world.rank], comm=comm)
    for channel in range(2):
        values = [Fraction(float(value)) for value in np.concatenate(parts)[:, channel]]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        assert abs(Fraction(float(cache.var[channel])) / variance - 1) < 1e-10
    assert held_alike(world, cache.mean, cache.var)


def test_constant_channels_have_exactly_no_deviation(comm, world):
    constants = np.array([0.1, 1e4 + 0.3, 1e7, 1e10, 1 / 3, -7e-9]) * np.linspace(0.5, 1.5, 200)[:, None]
    for counts in splits(world.size, seed=9):
        x = np.broadcast_to(constants.ravel(), (counts[world.rank], constants.size))
        y, cache = an.batch_norm_forward(x, bias=np.full(constants.size, 0.7), comm=comm)
        np.testing.assert_array_equal(y, np.full(y.shape, 0.7))
        np.testing.assert_array_equal(cache.mean, constants.ravel())
        np.testing.assert_array_equal(cache.var, np.zeros(constants.size))
