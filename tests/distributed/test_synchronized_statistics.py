"""Batch norm over simulated ranks: what is sent, how exact the statistics are, which bits the ranks hold."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed.threads import run_ranks

FORWARDS = [an.batch_norm_forward, an.batch_norm_add_relu_forward]
HARD_COUNTS = (37, 200, 5, 0)  # one shard each of a float32 batch with mean 1e4 and standard deviation 1e-2


def split(x, counts):
    return np.split(x, np.cumsum(counts)[:-1])


def bits(*arrays):
    return [array.tobytes() for array in arrays]


# -- what is sent ----------------------------------------------------------------------------------------------


class Recorder:
    """A user's own communicator: the five members of the protocol around another one, and a list of the calls."""

    def __init__(self, comm):
        self.rank, self.size, self.calls, self._comm = comm.rank, comm.size, [], comm

    def agree(self, fields, error=None):
        self.calls.append("agree")
        self._comm.agree(fields, error)

    def merge_moments(self, n, mean, m2):
        self.calls.append("merge_moments")
        return self._comm.merge_moments(n, mean, m2)

    def allreduce_sum(self, a):
        self.calls.append("allreduce_sum")
        return self._comm.allreduce_sum(a)


FORWARD_CALLS, BACKWARD_CALLS = ["agree", "merge_moments"], ["agree", "allreduce_sum"]


@pytest.mark.parametrize("counts", [(4, 4), (7, 1, 0)], ids=str)
@pytest.mark.parametrize("cls", [an.SyncBatchNorm, an.FusedBatchNorm])
def test_a_step_sends_one_payload_each_way_after_one_agreement_each(cls, counts):
    shards = split(np.random.default_rng(0).normal(size=(8, 3)), counts)

    def call(comm):
        recorder = Recorder(comm)
        layer = cls(3, comm=recorder)
        for _ in range(2):
            layer.backward(layer(shards[comm.rank]))
        return recorder.calls

    assert run_ranks(len(counts), call) == [2 * (FORWARD_CALLS + BACKWARD_CALLS)] * len(counts)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda function: function.__name__)
def test_functions_send_the_same(forward):
    x = np.random.default_rng(0).normal(size=(4, 3))

    def call(comm):
        recorder = Recorder(comm)
        y, cache = forward(x, comm=recorder)
        getattr(an, forward.__name__.replace("forward", "backward"))(y, cache)
        return recorder.calls

    assert run_ranks(2, call) == [FORWARD_CALLS + BACKWARD_CALLS] * 2


@pytest.mark.parametrize("affine", [True, False])
def test_a_rank_that_wants_no_parameter_gradients_takes_part_in_backward(affine):
    x = np.random.default_rng(0).normal(size=(4, 3))

    def call(comm):
        recorder = Recorder(comm)
        layer = an.SyncBatchNorm(3, affine=affine, comm=recorder)
        layer.requires_grad_(comm.rank == 0)
        layer(x)
        return layer.backward(x), recorder.calls

    for dx, calls in run_ranks(2, call):
        assert dx.shape == x.shape
        assert calls == FORWARD_CALLS + BACKWARD_CALLS


@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("cls", [an.SyncBatchNorm, an.FusedBatchNorm])
def test_eval_sends_nothing(cls, tracking):
    x = np.random.default_rng(0).normal(size=(4, 3))

    def call(comm):
        recorder = Recorder(comm)
        layer = cls(3, track_running_stats=tracking, comm=recorder).eval()
        layer.backward(layer(x))
        return recorder.calls

    assert run_ranks(2, call) == [[], []]


# -- how exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda function: function.__name__)
def test_the_variance_over_uneven_ranks_is_good_to_1e_10_where_the_mean_is_a_million_deviations(forward):
    # [sum x, sum x^2] in float64 is off by 3e-3 here, in float32 by 1e6 and negative.
    x = np.random.default_rng(1).normal(1e4, 1e-2, (sum(HARD_COUNTS), 8)).astype(np.float32)
    shards = split(x, HARD_COUNTS)
    for _, cache in run_ranks(len(shards), lambda comm: forward(shards[comm.rank], comm=comm)):
        assert cache.n == len(x)
        for channel, column in enumerate(x.T):
            exact = [Fraction(float(value)) for value in column]
            mean = sum(exact) / len(exact)
            var = sum((value - mean) ** 2 for value in exact) / len(exact)
            assert abs(Fraction(float(cache.var[channel])) / var - 1) < 1e-10


@pytest.mark.parametrize("constant", [1e4 + 0.3, 1e7, 1e10])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("counts", [HARD_COUNTS, (1, 1), (0, 3, 1)], ids=str)
def test_a_constant_channel_gives_exactly_the_bias_and_no_gradient(counts, dtype, constant):
    shards = split(np.full((sum(counts), 2), constant, dtype), counts)
    bias = np.array([0.7, -3.0], dtype)

    def call(comm):
        y, cache = an.batch_norm_forward(shards[comm.rank], np.ones(2, dtype), bias, comm=comm)
        return y, cache.var, an.batch_norm_backward(np.ones_like(y), cache).dweight

    for y, var, dweight in run_ranks(len(counts), call):
        np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
        np.testing.assert_array_equal(var, 0.0)
        np.testing.assert_array_equal(dweight, 0.0)


def test_ranks_that_are_constant_each_deviate_by_their_distance():
    # 1, 2 and 3 samples at 0, 3 and 6: mean 4, variance (16 + 2 * 1 + 3 * 4) / 6 = 5, all exact in binary.
    def call(comm):
        return an.batch_norm_forward(np.full((comm.rank + 1, 1), 3.0 * comm.rank), comm=comm)[1]

    for cache in run_ranks(3, call):
        assert (cache.n, float(cache.mean[0]), float(cache.var[0])) == (6, 4.0, 5.0)


def test_shards_far_from_each_other_are_normalized_as_one_batch():
    counts = (3, 40, 1, 17)
    x = np.random.default_rng(2).normal(size=(sum(counts), 5))
    shards = [shard + 10.0**rank for rank, shard in enumerate(split(x, counts))]
    expected = an.batch_norm(np.concatenate(shards))
    y = np.concatenate(run_ranks(4, lambda comm: an.batch_norm(shards[comm.rank], comm=comm)))
    assert np.max(abs(y - expected)) < 1e-12 * np.max(abs(expected))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_on_one_rank_hurts_its_channel_alone_on_all_ranks(value):
    x = np.random.default_rng(3).normal(size=(9, 3))
    hurt = x.copy()
    hurt[5, 1] = value

    def normalized(batch):
        shards = split(batch, (4, 3, 2))
        return np.concatenate(run_ranks(3, lambda comm: an.batch_norm(shards[comm.rank], comm=comm)))

    y = normalized(hurt)
    assert np.isnan(y[:, 1]).all()
    np.testing.assert_array_equal(y[:, ::2], normalized(x)[:, ::2])


# -- the same bits ---------------------------------------------------------------------------------------------


def training(comm, shards):
    """Three steps of a layer; everything that all ranks must hold alike."""
    layer = an.SyncBatchNorm(4, comm=comm)
    for _ in range(3):
        layer.backward(layer(shards[comm.rank]) ** 2)
    return layer.running_mean, layer.running_var, layer.num_batches_tracked


def test_buffers_have_the_same_bits_on_all_ranks_and_in_every_run():
    shards = split(np.random.default_rng(4).normal(1e3, 1, (sum(HARD_COUNTS), 4)).astype(np.float32), HARD_COUNTS)
    held = [bits(*buffers) for _ in range(5) for buffers in run_ranks(4, lambda comm: training(comm, shards))]
    assert all(buffers == held[0] for buffers in held)


def test_another_order_of_the_ranks_changes_no_more_than_rounding():
    shards = split(np.random.default_rng(5).normal(1.0, 1.0, (20, 4)), (9, 1, 10, 0))
    one = run_ranks(4, lambda comm: training(comm, shards))[0]
    other = run_ranks(4, lambda comm: training(comm, shards[::-1]))[0]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_max_ulp(
            a.astype(np.float32), b.astype(np.float32), 1
        )  # float32 buffers of float64 sums
