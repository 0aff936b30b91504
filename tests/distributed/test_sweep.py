"""Batch norm over 1 to 64 simulated ranks is batch norm on the concatenated batch, however it is cut."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
import sweep
from arraynorm.distributed import ThreadCommunicator
from mpi.shards import assert_within_an_ulp, sizes_before_cancellation
from sync_cases import on_ranks

RANKS = (1, 2, 3, 4, 8, 16, 64)


def held(case, data):
    """What each rank holds that merges the way of `case`."""

    def rank(comm):
        limited = ThreadCommunicator(comm._group, comm.rank, max_gathered_ranks=sweep.THRESHOLDS[case.path])
        return sweep.on_rank(case, data, limited)

    return on_ranks(len(data.counts), rank)


@pytest.mark.parametrize("case", sweep.CASES, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_are_one_batch(ranks, case):
    data = sweep.batch(ranks, case)
    sweep.assert_one_batch(case, held(case, data), sweep.in_one_process(case, data))


@pytest.mark.parametrize("apart", [0.0, 3.0], ids=["one mean", "a mean per rank"])
@pytest.mark.parametrize(
    "case", [case for case in sweep.CASES if case.dtype == "float64" and case.layout == "2d"], ids=str
)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_mean_of_a_million_deviations_costs_as_many_roundings_as_in_one_process(ranks, case, apart):
    data = sweep.batch(ranks, case, mean=1e4, std=1e-2, apart=apart)
    sweep.assert_one_batch(case, held(case, data), sweep.in_one_process(case, data), condition=data.condition())


def test_the_cuts_have_empty_ranks_and_single_samples():
    for ranks in RANKS:
        counts = sweep.cut(ranks, seed=ranks)
        assert len(counts) == ranks
        assert (0 in counts) == (ranks > 1)
        assert (1 in counts) == (ranks > 2)


@pytest.mark.parametrize("seed", range(60))
def test_many_float32_channels_of_any_mean_and_size_are_the_same_to_an_ulp(seed):
    """Statistics differ in the last bits, and here and there a result's nearest float with them, but not by two.

    That takes results of one rounding, and sums of few values in float64: with results of two roundings and sums in
    float32, of 120 such two-dimensional batches 16 had an element that was two ulps off.
    """
    rng = np.random.default_rng(seed)
    channels, counts = 150, rng.integers(1, (14, 40, 100)[seed % 3], 3)
    spatial = ((), (2,), (), (3, 2), (7, 7))[seed % 5]
    mean, std = 10.0 ** rng.uniform(-2, 3), 10.0 ** rng.uniform(-2, 1)
    shape = (counts.sum(), channels, *spatial)
    x, dy = rng.normal(mean, std, shape).astype(np.float32), rng.normal(0, 1, shape).astype(np.float32)
    cuts = np.cumsum(counts)[:-1]

    def trained(layer, x, dy):
        layer.weight[...], layer.bias[...] = np.linspace(0.5, 2, channels), np.linspace(-1, 1, channels)
        return layer(x), layer.backward(dy)

    whole = an.BatchNorm(channels)
    expected = trained(whole, x, dy)
    shards = list(zip(np.split(x, cuts), np.split(dy, cuts), strict=True))
    ranks = on_ranks(3, lambda comm: trained(an.SyncBatchNorm(channels, comm=comm), *shards[comm.rank]))
    sizes = sizes_before_cancellation(whole, x, dy)
    for parts, of_whole, size in zip(zip(*ranks, strict=True), expected, sizes, strict=True):
        assert_within_an_ulp(np.concatenate(parts), of_whole, size)
