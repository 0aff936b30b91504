"""Batch norm over the first 2, 3, ... ranks of the world is batch norm on the concatenated batch, however it is cut."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import arraynorm as an
import sweep
from arraynorm.distributed import MPICommunicator
from mpi.conftest import RANKS
from mpi.shards import held_alike, shard

C = 4
HARD_COUNTS = (37, 200, 5, 0)  # of the first four ranks; the others have a few samples, some none
SIZES = range(2, RANKS + 1)


@pytest.fixture(params=sweep.THRESHOLDS.values(), ids=sweep.THRESHOLDS)
def threshold(request):
    return request.param


@pytest.fixture(params=SIZES, ids=lambda size: f"{size} ranks")
def raw(request, world):
    """The first so many ranks of the world; None on the others, which have nothing to do."""
    from mpi4py import MPI

    group = world.Split(0 if world.rank < request.param else MPI.UNDEFINED)
    yield None if group == MPI.COMM_NULL else group
    if group != MPI.COMM_NULL:
        group.Free()


@pytest.mark.parametrize("dtype", sweep.DTYPES)
@pytest.mark.parametrize("path", sweep.THRESHOLDS)
@pytest.mark.parametrize("kind", sweep.KINDS)
def test_ranks_are_one_batch(raw, kind, dtype, path):
    if raw is None:
        return
    layouts = list(sweep.LAYOUTS)  # in turn: all of them with each of the others on simulated ranks
    case = sweep.Case(kind, layouts[(raw.size + sweep.DTYPES.index(dtype)) % len(layouts)], dtype, path)
    data = sweep.batch(raw.size, case)
    comm = MPICommunicator(raw, max_gathered_ranks=sweep.THRESHOLDS[case.path])
    ranks = raw.allgather(sweep.on_rank(case, data, comm))
    sweep.assert_one_batch(case, ranks, sweep.in_one_process(case, data))


def hard_counts(ranks):
    return [*HARD_COUNTS, 0, 9, 1, 30][:ranks]


@pytest.mark.parametrize("apart", [0.0, 1e-2], ids=["one mean", "a mean per rank"])
def test_the_variance_keeps_ten_digits_where_the_mean_is_a_million_deviations(raw, threshold, apart):
    if raw is None:
        return
    counts = hard_counts(raw.size)
    x = np.random.default_rng(1).normal(1e4, 1e-2, (sum(counts), C))
    x = (x + np.repeat(apart * np.arange(raw.size), counts)[:, None]).astype(np.float32)
    comm = MPICommunicator(raw, max_gathered_ranks=threshold)
    _, cache = an.batch_norm_forward(shard(x, counts, raw.rank), comm=comm)
    assert held_alike(raw, cache.mean, cache.var)
    for channel, column in enumerate(x.T):
        values = [Fraction(float(value)) for value in column]
        mean = sum(values) / len(values)
        var = sum((value - mean) ** 2 for value in values) / len(values)
        assert abs(Fraction(float(cache.var[channel])) / var - 1) < 1e-10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_channels_are_exact(raw, threshold, dtype):
    if raw is None:
        return
    counts = hard_counts(raw.size)
    several = np.array([0.1, 1e4 + 0.3, 1e10, -3e38, 1 / 3])
    constants = np.outer(several, np.linspace(0.5, 1.0, 40)).ravel().astype(dtype)
    x = np.broadcast_to(constants, (counts[raw.rank], len(constants)))
    bias = np.linspace(-1, 1, len(constants), dtype=dtype)
    comm = MPICommunicator(raw, max_gathered_ranks=threshold)
    y, cache = an.batch_norm_forward(x, np.ones_like(bias), bias, comm=comm)
    np.testing.assert_array_equal(cache.mean, constants)
    np.testing.assert_array_equal(cache.var, 0.0)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
