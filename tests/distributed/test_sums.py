"""Merging by two sums over the ranks, which is what many ranks do: as good as gathering everything."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import ThreadCommunicator
from arraynorm.testing import run_ranks

COUNTS = (37, 200, 5, 0)


def by_sums(comm):
    """The rank of a group that sums from two ranks on."""
    return ThreadCommunicator(comm._group, comm.rank, max_gathered_ranks=1)


def shards(x, counts=COUNTS):
    return np.split(x, np.cumsum(counts)[:-1])


def merged(parts):
    """Each rank's (n, mean, m2) of the union of `parts`."""

    def call(comm):
        _, cache = an.batch_norm_forward(parts[comm.rank], comm=by_sums(comm))
        return cache.n, cache.mean, cache.var

    return run_ranks(len(parts), call)


def test_hard_data_keeps_ten_digits_of_the_variance():
    x = (1e4 + 1e-2 * np.random.default_rng(0).standard_normal((sum(COUNTS), 3))).astype(np.float32)
    results = merged(shards(x))
    for channel in range(3):
        values = [Fraction(float(v)) for v in x[:, channel]]
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / len(values)
        for n, _, found in results:
            assert n == len(values)
            assert abs(Fraction(float(found[channel])) / var - 1) < 1e-10


@pytest.mark.parametrize("level", [1e4 + 0.3, 1e7, 1e10, 1 / 3, -7e-9])
def test_equal_constants_merge_to_that_constant_with_variance_zero(level):
    x = np.full((sum(COUNTS), 500), level) * np.linspace(0.5, 1.5, 500)  # 500 different constants
    for _, mean, var in merged(shards(x)):
        np.testing.assert_array_equal(mean, x[0])
        np.testing.assert_array_equal(var, 0)


def test_all_ranks_hold_the_same_bits():
    x = np.random.default_rng(0).standard_normal((sum(COUNTS), 50)) * np.logspace(-8, 8, 50)
    assert len({mean.tobytes() + var.tobytes() for _, mean, var in merged(shards(x))}) == 1


def test_a_nan_or_infinity_hurts_its_own_channel_alone():
    x = np.random.default_rng(0).standard_normal((sum(COUNTS), 3))
    x[0, 0], x[-1, 1] = np.nan, np.inf
    for _, mean, var in merged(shards(x)):
        assert np.isnan(var[:2]).all()
        np.testing.assert_allclose([mean[2], var[2]], [x[:, 2].mean(), x[:, 2].var()], rtol=1e-13)


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (1, 1), (1, 0, 1)])
def test_empty_and_single_samples(counts):
    x = np.random.default_rng(0).standard_normal((sum(counts), 4))
    for n, mean, var in merged(shards(x, counts)):
        assert n == len(x)
        if n:
            np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-13)
            np.testing.assert_allclose(var, x.var(axis=0), rtol=1e-13)


def test_the_backward_is_that_of_the_whole_batch():
    x, dy = np.random.default_rng(0).standard_normal((2, sum(COUNTS), 3))
    parts, dys = shards(x), shards(dy)

    def call(comm):
        _, cache = an.batch_norm_forward(parts[comm.rank], comm=by_sums(comm))
        return an.batch_norm_backward(dys[comm.rank], cache).dx

    _, cache = an.batch_norm_forward(x)
    whole = an.batch_norm_backward(dy, cache).dx
    np.testing.assert_allclose(np.concatenate(run_ranks(len(parts), call)), whole, rtol=0, atol=1e-12)
