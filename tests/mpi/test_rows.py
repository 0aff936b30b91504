"""Messages that carry what is said of a call and its payload: of every length, over and over, and beyond what fits."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import MPICommunicator, SyncMismatchError
from arraynorm.distributed._agreement import HEAD
from arraynorm.distributed._rows import _LENGTHS, row_capacity


def assert_sums(comm, length):
    ranks = comm.size
    total = comm.allreduce_sum(np.arange(length) + float(comm.rank))
    np.testing.assert_array_equal(total, ranks * np.arange(length) + ranks * (ranks - 1) / 2)


def test_payloads_of_more_lengths_than_are_kept_and_longer_than_a_row_are_summed(world):
    comm = MPICommunicator(world.Dup())
    longest = row_capacity(world.size) - HEAD
    for length in (*range(_LENGTHS + 5), longest, longest + 1, 2 * longest, *range(_LENGTHS + 5)):
        comm.agree(b"a sum")
        assert_sums(comm, length)


@pytest.mark.parametrize("odd", [3, "long"])
def test_a_payload_that_fits_and_one_that_does_not_are_told_apart(world, odd):
    if world.size == 1:
        pytest.skip("one rank has nobody to differ from")
    comm = MPICommunicator(world.Dup())
    long = row_capacity(world.size)
    mine = {3: (3, long), "long": (long, 3)}[odd][world.rank != world.size - 1]
    with pytest.raises(SyncMismatchError, match=f"channels: .*{mine} on rank {world.rank}"):
        an.batch_norm(np.ones((4, mine)), comm=comm)
    x = np.random.default_rng(world.rank).normal(size=(4, long))
    everything = np.concatenate(world.allgather(x))
    y = an.batch_norm(everything)[4 * world.rank :][:4]
    np.testing.assert_allclose(an.batch_norm(x, comm=comm), y, rtol=0, atol=1e-12)


def test_communicators_that_have_sent_can_be_freed_and_made_again(world):
    for _ in range(5):
        raw = world.Dup()
        assert_sums(MPICommunicator(raw), 3)
        raw.Free()
